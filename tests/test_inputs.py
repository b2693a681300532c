"""Numbers and arrays of every kind that callers have, into every public function: taken as Python's own, or refused in
one line."""

import dataclasses
import importlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise
from input_calls import (
    AUDIO,
    CODES,
    LAYOUTS,
    NO_NUMBERS,
    RATES,
    REAL,
    REAL_KINDS,
    WHOLE,
    WHOLE_KINDS,
    WITHOUT_NUMBERS,
    Things,
    named,
    row_codes,
    same,
)

import modeling_encodec
from modeling_encodec import (
    EcdcReader,
    EncodecConfig,
    compress,
    decompress,
)
from modeling_encodec.bitstream.container import Header
from modeling_encodec.models import inputs_encodec as inputs
from modeling_encodec.training.losses import MelLoss


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def things(small_models, lms, tmp_path_factory) -> Things:
    return Things(small_models, lms, tmp_path_factory.mktemp("inputs"))


def test_every_public_function_is_in_the_tables():
    arrays = {name for name, *_ in AUDIO + CODES}
    there = {name for name, *_ in WHOLE + RATES + REAL} | arrays
    assert set(modeling_encodec.__all__) == (there | WITHOUT_NUMBERS) & set(modeling_encodec.__all__)
    assert set(modeling_encodec.__all__) >= WITHOUT_NUMBERS


@pytest.mark.parametrize(("call", "number"), named(WHOLE))
def test_whole_numbers_of_all_kinds_are_alike(things, call, number):
    expected = call(things, number)
    for kind, make in WHOLE_KINDS.items():
        assert same(call(things, make(number)), expected), kind


@pytest.mark.parametrize("call", named(RATES))
def test_rates_of_all_kinds_are_alike(things, call):
    expected = call(things, 24000)
    kinds = {**WHOLE_KINDS, "float": float, "np.float64": np.float64, "float tensor": lambda n: torch.tensor(float(n))}
    for kind, make in kinds.items():
        assert same(call(things, make(24000)), expected), kind


@pytest.mark.parametrize(("call", "number"), named(REAL))
def test_real_numbers_of_all_kinds_are_alike(things, call, number):
    expected = call(things, number)
    for kind, make in REAL_KINDS.items():
        got = call(things, make(number))
        assert got == expected if isinstance(expected, (int, float)) else same(got, expected), kind


@pytest.mark.parametrize(
    "call", named([row[:3] for row in WHOLE + RATES if row[0] not in ("EncodecLM", "plot_codebook_use")])
)
def test_what_is_no_whole_number_is_refused_in_one_line(things, call):
    for value in NO_NUMBERS:
        with pytest.raises(ValueError) as caught:
            call(things, value)
        text = str(caught.value)
        assert len(text.splitlines()) == 1 and "allowed" in text, text


@pytest.mark.parametrize("call", named([row[:3] for row in REAL if row[0] != "plot_training"]))
def test_what_is_no_number_is_refused(things, call):
    for value in (True, float("nan"), "1.8", b"1", 1j, [1.8], np.array([1.8, 3.6])):
        with pytest.raises((ValueError, TypeError)) as caught:
            call(things, value)
        assert str(caught.value)


# ---- audio and codes ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call", named(AUDIO))
def test_audio_of_all_layouts_and_precisions_is_alike(things, call):
    audio = things.audio.half().float().numpy()  # so that no precision rounds it
    kinds = {
        **LAYOUTS,
        "float64": lambda a: a.astype(np.float64),
        "long double": lambda a: a.astype(np.longdouble),
        "float16": lambda a: a.astype(">f2"),
        "gradient": lambda a: torch.from_numpy(a).requires_grad_(),
    }
    expected = call(things, audio)
    for kind, make in kinds.items():
        got = call(things, make(audio))
        got = got.detach() if isinstance(got, torch.Tensor) else got
        if isinstance(got, np.ndarray) and got.dtype == np.float64 and expected.dtype == np.float32:
            got = got.astype(np.float32)  # resampled in the precision that was given
        close = isinstance(got, (np.ndarray, torch.Tensor)) and np.allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert close or same(got, expected), kind
    rough = torch.from_numpy(audio).bfloat16()
    assert same(call(things, rough.requires_grad_()), call(things, rough.detach().float().numpy())) or call is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call", named(CODES))
def test_codes_of_all_layouts_and_widths_are_alike(things, call):
    codes = things.row
    kinds = {**LAYOUTS, **{name: lambda a, name=name: a.astype(name) for name in ("uint8", ">u2", "i4", ">i8", "u4")}}
    expected = call(things, codes)
    for kind, make in kinds.items():
        assert same(call(things, make(codes)), expected), kind
    for wrong in (codes.astype(np.float32), codes.astype(str), codes.astype(complex), codes > 0):
        with pytest.raises(ValueError) as caught:
            call(things, wrong)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call", named([row for row in AUDIO if row[0] != "si_snr"]))
def test_integer_pcm_is_scaled_by_its_width_everywhere(things, call):
    bits = (things.audio.numpy() * 100).astype(np.int16)  # whole numbers that 8 bits hold too
    expected = call(things, (bits / 128).astype(np.float32))
    kinds = {
        "int8": bits.astype(np.int8),
        "uint8": (bits + 128).astype(np.uint8),
        "int16": bits << 8,
        ">i2": (bits << 8).astype(">i2"),
        "uint16": ((bits.astype(np.int32) << 8) + 32768).astype(np.uint16),
        "int32": bits.astype(np.int32) << 24,
        "uint32": ((bits.astype(np.int64) << 24) + (1 << 31)).astype(np.uint32),
    }
    kinds |= {f"{name} tensor": torch.from_numpy(kinds[name]) for name in ("int8", "uint8", "int16", "int32")}
    for kind, pcm in kinds.items():
        assert same(call(things, pcm), expected), kind
    for wrong in (bits > 0, bits.astype(np.int64), bits.astype(object), bits.astype(str), bits.astype(complex)):
        with pytest.raises(ValueError) as caught:
            call(things, wrong)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError):
        call(things, torch.from_numpy(bits).long())


def test_masks_lengths_and_scales_of_all_layouts(things):
    audio = noise(2, 1, 2400)
    mask = torch.ones(2, 2400, dtype=torch.long)
    mask[1, 2000:] = 0
    expected = things.model.encode(audio, mask, 1.8)
    doubled = np.repeat(mask.numpy(), 2, axis=1)[:, ::-1][:, ::-2]
    for kind in (doubled, mask.numpy() > 0, mask.numpy().astype(">i2"), mask.float(), mask.tolist()):
        coded = things.model.encode(audio, kind, 1.8)
        assert torch.equal(coded.audio_codes, expected.audio_codes)
    decoded = things.model.decode(**expected).audio_values
    for make in (np.array, lambda x: np.array(x, ">i4"), lambda x: np.array(x, np.uint16), torch.tensor, list):
        lengths = make(expected.audio_lengths.tolist())
        again = things.model.decode(expected.audio_codes, audio_lengths=lengths).audio_values
        assert torch.equal(again, decoded)
    for wrong in ([2400.0, 2000.0], [True, True], "24", [2400, None]):
        with pytest.raises(ValueError):
            things.model.decode(expected.audio_codes, audio_lengths=wrong)
    chunked = things.chunked.encode(noise(1, 2, 60_000), bandwidth=1.8)
    expected = things.chunked.decode(**chunked).audio_values
    for scales in (
        torch.stack(chunked.audio_scales).numpy(),
        [scale.numpy()[:, ::-1] for scale in chunked.audio_scales],
    ):
        again = things.chunked.decode(chunked.audio_codes, scales, audio_lengths=chunked.audio_lengths).audio_values
        assert torch.equal(again, expected)


def test_flags_of_numpy(things):
    coded = things.model.encode(things.audio[None], return_latents=np.True_, return_dict=np.True_)
    assert coded.latents is not None
    assert isinstance(things.model.encode(things.audio[None], return_dict=np.False_), tuple)
    data = compress(things.model, things.audio, 1.8)
    assert decompress(data, things.model, strict=np.True_)[0].shape == things.audio.shape
    assert EncodecConfig(normalize=np.False_).normalize is False


def test_configurations_save_python_numbers(tmp_path):
    config = EncodecConfig(
        target_bandwidths=np.array([1.5, 3.0]), upsampling_ratios=torch.tensor([8, 5, 4, 2]), num_filters=np.int64(4)
    )
    config.num_lstm_layers = np.int32(1)
    config.save_pretrained(tmp_path)
    loaded = EncodecConfig.from_pretrained(tmp_path)
    assert (loaded.num_filters, loaded.num_lstm_layers, list(loaded.target_bandwidths)) == (4, 1, [1.5, 3.0])
    assert type(config.num_lstm_layers) is int and config.upsampling_ratios == [8, 5, 4, 2]
    for wrong in ({"num_filters": np.float32(4)}, {"num_filters": np.array(["4"])}, {"normalize": np.int64(1)}):
        with pytest.raises(ValueError, match="allowed"):
            EncodecConfig(**wrong)


def test_lists_of_numbers_are_clips(things):
    samples = [0.5, -0.25, 0.0]
    expected = things.extractor(np.array(samples, np.float32), return_tensors="np")["input_values"]
    for given in (samples, list(np.array(samples, np.float32)), list(torch.tensor(samples))):
        assert same(things.extractor(given, return_tensors="np")["input_values"], expected)
    pair = things.extractor([torch.tensor(samples), np.array(samples[:2])], return_tensors="np")
    assert pair["padding_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_formatted_datasets_are_tokenized(things, kind):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    row = {"array": things.audio[0].numpy(), "sampling_rate": 24000}
    rows = datasets.Dataset.from_dict({"audio": [row] * 2}).with_format(kind)
    made = rows.map(things.tokens, batched=True, with_rank=True).with_format(None)
    assert made["error"][:] == [None, None] and np.array_equal(made["codes"][1], row_codes(things, row))


def test_parquet_of_decoded_audio_in_any_numbers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from modeling_encodec.processors.audio_tokens import read_clip
    from modeling_encodec.processors.corpus.sources import open_source

    pcm = (np.sin(np.arange(2400) / 20) * 20000).astype(np.int16)
    expected = (pcm / 32768).astype(np.float32)
    config = EncodecConfig()
    for number, (array, rate) in enumerate(((pcm, np.int32(24000)), (expected, np.float64(24000)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        fields = [("array", pyarrow.list_(pyarrow.from_numpy_dtype(array.dtype)))]
        fields.append(("sampling_rate", pyarrow.from_numpy_dtype(rate.dtype)))
        values = pyarrow.array([{"array": array.tolist(), "sampling_rate": rate}], pyarrow.struct(fields))
        pyarrow.parquet.write_table(pyarrow.table({"audio": values}), folder / "a.parquet")
        (shard,) = open_source(folder).shards
        (row,) = shard.rows()
        np.testing.assert_array_equal(read_clip(row.location, config)[0], expected)


# ---- the module itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inputs_encodec", "json_files_encodec"])
def test_a_file_that_travels_with_processors_is_the_same(name):
    one, other = ROOT / "modeling_encodec" / "models" / f"{name}.py", ROOT / "processors" / f"{name}.py"
    assert one.read_bytes() == other.read_bytes()
    modules = [importlib.import_module(f"modeling_encodec.{place}{name}") for place in ("models.", "processors.")]
    assert modules[0] is modules[1]  # one module, so that each warning comes once


def test_numbers():
    assert [inputs.whole_number("n", value, 0, 300) for value in (0, np.uint8(255), torch.tensor(7))] == [0, 255, 7]
    for value, said in ((301, "n is 301, allowed: 0 to 300"), ("4", "n is '4', allowed: 0 to 300, a whole number")):
        with pytest.raises(ValueError, match=f"^{said}$"):
            inputs.whole_number("n", value, 0, 300)
    with pytest.raises(ValueError, match=r"^n is -1, allowed: at least 0$"):
        inputs.whole_number("n", np.int64(-1), 0)
    assert type(inputs.real_number("n", np.float32(0.5))) is float and type(inputs.real_number("n", np.int8(2))) is int
    assert inputs.match_number(np.float16(2.2), [1.1, 2.2]) == inputs.match_number(torch.tensor(2.2), (2.2,)) == 2.2
    assert inputs.match_number(2.2001, [2.2]) is None and inputs.match_number("2.2", [2.2]) is None
    assert len(inputs.shown("x" * 1000)) == 100 and "\n" not in inputs.shown(np.zeros((9, 9)))


def test_nothing_is_copied_that_is_plain_already():
    audio = np.zeros((2, 100), np.float32)
    assert inputs.audio_array("a", audio) is audio
    tensor = torch.zeros(2, 100, dtype=torch.float64)
    assert np.shares_memory(inputs.plain_array("a", tensor), tensor.numpy())


def test_pcm_reaches_exactly_from_minus_one_to_below_one():
    for name, bits in inputs.PCM_BITS.items():
        info = np.iinfo(name)
        ends = inputs.scale_pcm("a", np.array([info.min, info.max], name))
        assert (
            ends.dtype == np.float32
            and ends[0] == -1
            and ends[1] == np.float32((2 ** (bits - 1) - 1) / 2 ** (bits - 1))
        )
        middle = inputs.scale_pcm("a", np.array([0 if info.min else 1 << (bits - 1)], name))
        assert middle[0] == 0
    assert inputs.scale_pcm("a", np.array([0, 1, -1])).tolist() == [0, 1, -1]


def test_headers_take_numbers_of_any_kind(things):
    header = EcdcReader(io.BytesIO(things.write(4))).header
    fields = dataclasses.asdict(header)
    other = Header(**{k: np.int64(v) if type(v) is int else v for k, v in fields.items()})
    assert other == header and all(type(v) is type(fields[k]) for k, v in dataclasses.asdict(other).items())


def test_losses_take_rates_of_any_kind():
    audio = noise(1, 1, 4800)
    assert torch.equal(MelLoss(np.int64(24000))(audio, 0.5 * audio), MelLoss(24000)(audio, 0.5 * audio))
