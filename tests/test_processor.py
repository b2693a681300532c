"""EncodecProcessor: audio and codes to ids and back, what `Trainer` takes, saving, the Auto classes, the Hub."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import noise
from fake_hub import Account, FakeHub
from transformers import LlamaConfig, LlamaForCausalLM, MusicgenDecoderConfig, MusicgenForCausalLM
from without_package import WITHOUT_THE_PACKAGE

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.code_vocabulary import CodeVocabulary
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.processors.processing_encodec import EncodecProcessor


NAMES = ["24khz", "48khz", "32khz"]
LAYOUTS = ["frame", "codebook", "delay"]


def make(model, **settings) -> EncodecProcessor:
    """The processor at the model's highest bandwidth."""
    return EncodecProcessor.for_model(model, model.config.target_bandwidths[-1], **settings)


def make_clips(model) -> list[np.ndarray]:
    """Four clips of a sample to two seconds; at 48 kHz the third has a chunk before the last that is short too."""
    config = model.config
    lengths = (config.sampling_rate + 700, 1, 95_100 if config.chunk_length else 5000, 2 * config.sampling_rate)
    return [noise(1, config.audio_channels, samples, seed=samples)[0].numpy() for samples in lengths]


@torch.no_grad()
def encoded(model, clips):
    inputs = EncodecFeatureExtractor.for_model(model.config)(
        clips, sampling_rate=model.config.sampling_rate, return_tensors="pt"
    )
    return model.encode(**inputs, bandwidth=model.config.target_bandwidths[-1])


def make_lm(processor, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | settings
    specials = {name: getattr(processor, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=processor.vocab_size, **specials, **size))


# ---- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_audio_there_and_back_is_the_codecs_to_the_bit(name, layout, small_models):
    model = small_models[name]
    processor, clips = make(model, layout=layout), make_clips(model)
    batch = processor(
        clips, model.config.sampling_rate, return_labels=False, return_audio_info=True, padding_side="left"
    )
    info = {key: batch[key] for key in ("audio_lengths", "audio_scales") if key in batch}
    assert ("audio_scales" in info) == model.config.normalize
    decoded = processor.decode(batch["input_ids"], **info)
    coded = encoded(model, clips)
    with torch.no_grad():
        expected = model.decode(**coded).rows()
    assert len(decoded) == len(expected) == 4
    for got, row, clip in zip(decoded, expected, clips):
        assert got.dtype == torch.float32 and got.shape == clip.shape and torch.equal(got, row)
    codes = processor.decode_codes(batch["input_ids"])
    assert [row.shape[1] for row in codes] == coded.codes_lengths.tolist()
    assert all(torch.equal(row, coded.audio_codes[0, r, :, : row.shape[1]]) for r, row in enumerate(codes[1:2], 1))
    again = processor(codes=codes, return_labels=False, padding_side="left")
    assert torch.equal(again["input_ids"], batch["input_ids"])
    assert torch.equal(again["attention_mask"], batch["attention_mask"])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_each_clip_alone(name, small_models):
    model = small_models[name]
    processor, clips = make(model), make_clips(model)
    batch = processor(clips, model.config.sampling_rate)
    for ids, mask, labels, clip in zip(*batch.values(), clips):
        alone = processor(torch.from_numpy(clip), model.config.sampling_rate)
        length = alone["input_ids"].shape[1]
        assert torch.equal(ids[:length], alone["input_ids"][0]) and mask.tolist() == [1] * length + [0] * (
            len(ids) - length
        )
        assert torch.equal(labels[:length], ids[:length]) and (labels[length:] == -100).all()
        assert (ids[length:] == processor.pad_token_id).all() and alone["attention_mask"].all()
        assert ids[0] == processor.bos_token_id and ids[length - 1] == processor.eos_token_id


def test_every_kind_of_clip(small_models):
    processor = make(small_models["24khz"])
    clips = [clip[0] for clip in make_clips(small_models["24khz"])]
    expected = processor(clips, 24000)
    for kind in (torch.from_numpy, list):
        batch = processor([kind(clip) for clip in clips], 24000)
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    arrays = processor(clips, 24000, return_tensors="np")
    assert all(isinstance(arrays[key], np.ndarray) and arrays[key].dtype == np.int64 for key in expected)
    assert np.array_equal(arrays["labels"], expected["labels"].numpy())
    one = processor(clips[0], 24000, add_bos=False, add_eos=False)["input_ids"]
    assert one.shape == (1, 8 * 78) and torch.equal(one[0], expected["input_ids"][0, 1 : 1 + one.shape[1]])


def test_rows_of_a_data_set(small_models):
    """Ragged codes of 16 bits, as lists, arrays, tensors, and as `datasets` gives them in each of its formats."""
    processor = make(small_models["24khz"])
    generator = np.random.default_rng(0)
    codes = [generator.integers(0, 64, (8, frames)).astype(np.uint16) for frames in (5, 0, 9)]
    expected = processor(codes=codes)
    assert expected["attention_mask"].sum(1).tolist() == [42, 2, 74]
    assert all(np.array_equal(a, b) for a, b in zip(processor.decode_codes(expected["input_ids"]), codes))
    features = datasets.Features({"codes": datasets.List(datasets.List(datasets.Value("uint16")))})
    rows = datasets.Dataset.from_dict({"codes": codes}, features=features)
    stacked = np.zeros((3, 8, 9), np.uint16)
    for row, one in zip(stacked, codes):
        row[:, : one.shape[1]] = one
    cases = {
        "lists": [one.tolist() for one in codes],
        "tensors": [torch.from_numpy(one) for one in codes],
        "data set": rows[:]["codes"],
        "data set of arrays": rows.with_format("numpy")[:]["codes"],
        "one row at a time": [row["codes"] for row in rows.with_format("numpy")],
    }
    for case, given in cases.items():
        assert torch.equal(processor(codes=given)["input_ids"], expected["input_ids"]), case
    for given in (stacked, torch.from_numpy(stacked)):
        assert torch.equal(processor(codes=given, lengths=[5, 0, 9])["input_ids"], expected["input_ids"])
    for single in (codes[0], codes[0].tolist(), torch.from_numpy(codes[0])):
        assert torch.equal(processor(codes=single)["input_ids"], expected["input_ids"][:1, :42])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_of_no_frame_are_no_audio(layout, small_models):
    processor = make(small_models["24khz"], layout=layout)
    batch = processor(codes=[np.zeros((8, 0), np.uint16), np.zeros((8, 2), np.uint16)], return_labels=False)
    assert [tuple(audio.shape) for audio in processor.decode(batch["input_ids"])] == [(1, 0), (1, 640)]
    bare = processor(codes=np.zeros((2, 8, 0), int), add_bos=False, add_eos=False, return_labels=False)["input_ids"]
    assert bare.shape == ((2, 8, 7) if layout == "delay" else (2, 0))
    assert [tuple(codes.shape) for codes in processor.decode_codes(bare)] == [(8, 0)] * 2


def test_audio_of_chunks_with_loudness(small_models):
    """A number does for scales that nobody knows; without lengths the chunks are whole ones."""
    model = small_models["48khz"]
    processor = make(model)
    codes = np.random.default_rng(0).integers(0, 64, (4, 310))
    ids = processor(codes=codes)["input_ids"]
    with pytest.raises(ValueError, match="row 0: audio_scales are missing, allowed: those of return_audio_info, or a"):
        processor.decode(ids)
    chunks = torch.zeros(3, 1, 4, 150, dtype=torch.long)
    for chunk, start in zip(chunks, (0, 150, 300)):
        part = torch.from_numpy(codes[:, start : start + 150])
        chunk[0, :, : part.shape[1]] = part
    with torch.no_grad():
        expected = model.decode(chunks, [torch.tensor([[0.1]])] * 3, last_frame_pad_length=140)[0][0]
    for scales in (0.1, [[0.1, 0.1, 0.1]], torch.tensor([[0.1, 0.1, 0.1, 0.0]])):
        assert torch.equal(processor.decode(ids, audio_scales=scales)[0], expected)
    with pytest.raises(ValueError, match="row 0: audio_scales are 2, allowed: 3, one a chunk"):
        processor.decode(ids, audio_scales=[[0.1, 0.1]])
    with pytest.raises(ValueError, match="audio_scales are 2, allowed: 1, one a row of ids"):
        processor.decode(ids, audio_scales=[[0.1] * 3] * 2)
    with pytest.raises(ValueError, match="row 0: there are 310 frames for 48000 samples, allowed: 152"):
        processor.decode(ids, audio_scales=0.1, audio_lengths=[48_000])


def test_half_precision_gets_float32_and_gives_it(small_models, tmp_path):
    small_models["24khz"].save_pretrained(tmp_path)
    half = EncodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    processor = make(half)
    audio = processor.decode(processor(noise(1, 1, 5000)[0], 24000)["input_ids"])[0]
    assert audio.dtype == torch.float32 and audio.shape == (1, 5120) and audio.abs().max() > 0


# ---- language models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["frame", "codebook"])
def test_a_causal_language_model_takes_a_batch(layout, small_models):
    model = small_models["24khz"]
    processor = make(model, layout=layout)
    lm = make_lm(processor)
    batch = processor(make_clips(model)[:3], 24000)
    assert list(batch) == processor.model_input_names
    output = lm(**batch)
    ids = batch["input_ids"]
    logits = output.logits[:, :-1][batch["attention_mask"][:, 1:] == 1]
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:][batch["attention_mask"][:, 1:] == 1])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    grown = lm.get_input_embeddings().weight.grad.abs().sum(1) > 0
    assert set(grown.nonzero()[:, 0].tolist()) == set(ids[batch["labels"] != -100].tolist()) - {processor.eos_token_id}


def test_what_a_language_model_generates(small_models):
    """Of random weights anything comes: it is decoded where it can be, and refused with the place where not."""
    processor = make(small_models["24khz"])
    lm = make_lm(processor).eval()
    prompts = processor(
        codes=[np.full((8, frames), 7) for frames in (2, 4)], add_eos=False, padding_side="left", return_labels=False
    )

    class Turns(transformers.LogitsProcessor):
        """Leaves the ids of the codebook whose turn it is, after the prompt's whole frames."""

        def __call__(self, ids, scores):
            first = 64 * ((ids.shape[1] - prompts["input_ids"].shape[1]) % 8)
            outside = torch.full_like(scores, -torch.inf)
            outside[:, first : first + 64] = 0
            return scores + outside

    ids = lm.generate(**prompts, max_new_tokens=13, do_sample=True, logits_processor=[Turns()])
    with pytest.raises(
        ValueError, match='row 0: there are 29 ids of codes, allowed: a multiple of 8, or incomplete="'
    ):
        processor.decode(ids)
    codes = processor.decode_codes(ids, incomplete="drop")
    assert [tuple(row.shape) for row in codes] == [(8, 3), (8, 5)]
    assert all(
        (row[:, :-1] == 7).all() and torch.equal(row[:, -1] + 64 * torch.arange(8), new[-13:-5])
        for row, new in zip(codes, ids)
    )
    audio = processor.decode(ids, incomplete="drop")
    with torch.no_grad():
        assert torch.equal(audio[1], small_models["24khz"].decode(codes[1][None])[0][0])
    torch.manual_seed(1)
    free = lm.generate(**prompts, max_new_tokens=16, do_sample=True)
    with pytest.raises(ValueError, match=r"row 0: id \d+ in frame 2, codebook 0, allowed there: 0 to 63"):
        processor.decode(free, incomplete="drop")


def test_musicgens_decoder_takes_a_batch(small_models):
    """Shifted as it shifts labels itself; and what it samples is decoded."""
    codec = small_models["32khz"]
    processor = make(codec, layout="delay")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "num_codebooks": 4}
    specials = {"pad_token_id": processor.pad_token_id, "bos_token_id": processor.bos_token_id}
    torch.manual_seed(0)
    config = MusicgenDecoderConfig(vocab_size=codec.config.codebook_size, **size, **specials)
    decoder = MusicgenForCausalLM(config).eval()
    batch = processor(make_clips(codec)[:3], 32000)
    steps = 52 + 3
    assert batch["input_ids"].shape == (3, 4, steps) and batch["labels"].shape == (3, steps, 4)
    assert batch["attention_mask"].sum(1).tolist() == [steps, 1 + 3, 8 + 3]
    with torch.no_grad():
        both = decoder(**batch)
        alone = decoder(labels=batch["labels"], attention_mask=batch["attention_mask"])
    assert torch.isfinite(both.loss) and torch.equal(both.loss, alone.loss)
    whole = processor(make_clips(codec)[:3], 32000, return_labels=False)["input_ids"]
    assert torch.equal(whole[..., :-1], batch["input_ids"])
    codes = processor.decode_codes(whole)
    assert all(torch.equal(a, b) for a, b in zip(processor.decode_codes(whole.view(12, -1)), codes))
    ids, mask = decoder.build_delay_pattern_mask(torch.full((8, 1), 64), pad_token_id=64, max_length=12)
    for _ in range(11):  # what its `generate` does, which then takes the delay off
        logits = decoder(decoder.apply_delay_pattern_mask(ids, mask)).logits[:, -1]
        ids = torch.cat([ids, logits.softmax(1).multinomial(1)], dim=1)
    made = processor.decode_codes(decoder.apply_delay_pattern_mask(ids, mask))
    assert [tuple(row.shape) for row in made] == [(4, 8)] * 2
    assert torch.equal(made[1][2], ids.view(2, 4, -1)[1, 2, 3:11]) and len(made[1].unique()) > 4


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_refusals(small_models):
    model = small_models["24khz"]
    processor, stock = make(model), transformers.EncodecModel(transformers.EncodecConfig(num_filters=4))
    extractor, vocabulary = processor.feature_extractor, processor.vocabulary
    codes = np.zeros((8, 3), np.uint16)
    lines = {
        r"bandwidth is None, allowed: one of \[0.9, 1.8, 3.6\] kbps, or num": lambda: EncodecProcessor.for_model(
            model
        ),
        r"vocabulary is None, allowed: a CodeVocabulary": lambda: EncodecProcessor(extractor, model),
        r"audio_tokenizer is a transformers.+EncodecModel, allowed": lambda: EncodecProcessor(
            extractor, stock, vocabulary
        ),
        r"codebook_size is 60, allowed: 64, as of the": lambda: EncodecProcessor(
            extractor, model, CodeVocabulary(60, 8, 75)
        ),
        r"num_quantizers is 9, allowed: up to 8": lambda: EncodecProcessor(
            extractor, model, CodeVocabulary(64, 9, 75)
        ),
        r"sampling_rate is 32000, allowed: 24000": lambda: EncodecProcessor(
            EncodecFeatureExtractor(1, 32000), model, vocabulary
        ),
        r"feature_size is 2, allowed: 1, as": lambda: EncodecProcessor(
            EncodecFeatureExtractor(2, 24000), model, vocabulary
        ),
        r"there is no audio_tokenizer, allowed for audio": lambda: EncodecProcessor(extractor, None, vocabulary)(
            np.zeros(9, np.float32), 24000
        ),
        r"neither of audio and codes given, allowed: one": lambda: processor(),
        r"both of audio and codes given, allowed: one": lambda: processor(np.zeros(9), 24000, codes=codes),
        r"clip 1: codes have shape \(4, 3\), allowed: \(8, frames\)": lambda: processor(codes=[codes, codes[:4]]),
        r"clip 0: code 64 in frame 2, codebook 7, allowed there: 0 to 63": lambda: processor(
            codes=np.where(np.arange(24).reshape(8, 3) == 23, 64, 0)
        ),
        r"clip 0: codes are float64": lambda: processor(codes=np.zeros((8, 3))),
        r"there are no codes, allowed": lambda: processor(codes=[]),
        r"lengths are \[4\], allowed: 1 of": lambda: processor(codes=codes[None], lengths=[4]),
        r"lengths are given, allowed with audio: none": lambda: processor(np.zeros(9), 24000, lengths=[1]),
        r"return_audio_info is True, allowed with codes": lambda: processor(codes=codes, return_audio_info=True),
        r"return_tensors is 'tf', allowed: 'pt', 'np'": lambda: processor(codes=codes, return_tensors="tf"),
        r"side is 'both', allowed: right, left": lambda: processor(codes=codes, padding_side="both"),
        r"row 1: id 512 \(padding\) at place 1, allowed": lambda: processor.decode([[], [0, 512, 64]]),
        r"add_bos is False, allowed in a delay": lambda: make(model, layout="delay")(codes=codes, add_bos=False),
    }
    for line, action in lines.items():
        with pytest.raises(ValueError, match=line) as error:
            action()
        assert "\n" not in str(error.value)


# ---- saved and loaded --------------------------------------------------------------------------------------------


def equal(a: EncodecProcessor, b: EncodecProcessor) -> bool:
    audio, rate = noise(1, a.feature_extractor.feature_size, 5000)[0], a.feature_extractor.sampling_rate
    return a.vocabulary == b.vocabulary and torch.equal(a(audio, rate)["input_ids"], b(audio, rate)["input_ids"])


@pytest.mark.parametrize("order", ["model first", "processor first"])
def test_a_processor_beside_its_codec(order, small_models, tmp_path):
    """Both in one folder: each loads as before, in stock Transformers and here."""
    model = small_models["48khz"]
    processor = make(model, layout="delay", pattern=[0, 2, 2, 3])
    for saved in (model, processor) if order == "model first" else (processor, model):
        saved.save_pretrained(tmp_path)
    loaded = EncodecProcessor.from_pretrained(tmp_path)
    assert type(loaded.audio_tokenizer) is EncodecModel and type(loaded.feature_extractor) is EncodecFeatureExtractor
    assert equal(loaded, processor)
    assert not hasattr(EncodecProcessor.from_pretrained(tmp_path, audio_tokenizer=None), "audio_tokenizer")
    for kind in (transformers.AutoModel, transformers.EncodecModel):
        stock = kind.from_pretrained(tmp_path)
        assert type(stock) is transformers.EncodecModel
        assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), model.state_dict().values()))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(extractor) is transformers.EncodecFeatureExtractor
    assert (extractor.sampling_rate, extractor.feature_size, extractor.chunk_length_s) == (48000, 2, 1.0)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)


def test_a_processor_apart_from_its_codec(small_models, tmp_path):
    """As beside a language model. A codec in a folder is not named, since its path says nothing elsewhere."""
    model = small_models["24khz"]
    model.save_pretrained(tmp_path / "codec")
    processor = make(EncodecModel.from_pretrained(tmp_path / "codec"))
    processor.save_pretrained(tmp_path / "lm")
    make_lm(processor).save_pretrained(tmp_path / "lm")
    assert str(tmp_path) not in (tmp_path / "lm" / "processor_config.json").read_text()
    loaded = EncodecProcessor.from_pretrained(tmp_path / "lm")
    codes = torch.randint(0, 64, (8, 5))
    assert torch.equal(loaded.decode_codes(loaded(codes=codes)["input_ids"])[0], codes)
    with pytest.raises(ValueError, match="there is no audio_tokenizer, allowed for audio: an EncodecModel"):
        loaded.decode(loaded(codes=codes)["input_ids"])
    assert equal(EncodecProcessor.from_pretrained(tmp_path / "lm", audio_tokenizer=model), processor)
    with pytest.raises(ValueError, match="no EncodecProcessor, allowed: what its save_pretrained wrote"):
        EncodecProcessor.from_pretrained(tmp_path / "codec")
    with pytest.raises(ValueError, match="codebook_size is 64, allowed: 1024"):
        EncodecProcessor.from_pretrained(
            tmp_path / "lm", audio_tokenizer=EncodecModel.from_pretrained(bundled_checkpoint())
        )


REGISTER = """
import sys, transformers, modeling_encodec
from modeling_encodec.processors.processing_encodec import EncodecProcessor
modeling_encodec.register_auto_classes()
both, codec = sys.argv[1:]
processor = transformers.AutoProcessor.from_pretrained(both)
assert type(processor) is EncodecProcessor, type(processor)
assert type(processor.audio_tokenizer) is modeling_encodec.EncodecModel
assert type(transformers.AutoProcessor.from_pretrained(codec)) is modeling_encodec.EncodecFeatureExtractor
"""


def test_auto_processor_on_request(small_models, tmp_path):
    make(small_models["24khz"]).save_pretrained(tmp_path)
    small_models["24khz"].save_pretrained(tmp_path)
    command = [sys.executable, "-c", REGISTER, tmp_path, bundled_checkpoint()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---- the Hub -----------------------------------------------------------------------------------------------------

ELSEWHERE = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
audio, found = torch.load("audio.pt"), {}
for name in sys.argv[1:]:
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    extractor = processor.feature_extractor
    for part in (processor, processor.audio_tokenizer, extractor):
        assert type(part).__module__.startswith("transformers_modules"), type(part)
    ids = processor(audio.expand(extractor.feature_size, -1), extractor.sampling_rate)["input_ids"]
    found[name] = ids, processor.decode(ids, audio_scales=0.3)[0]
    processor.save_pretrained("again")
torch.save(found, "found.pt")
"""
)


def test_pushed_it_loads_on_a_machine_without_this_package(small_models, tmp_path, monkeypatch):
    """Beside its codec; beside something else, the codec in a repository of its own; in a folder, with its codec."""
    model, stereo, audio = small_models["24khz"], make(small_models["48khz"]), noise(1, 1, 5000)[0]
    with FakeHub({"hf_writerWriterWriter": Account("me")}) as hub:
        hub.use(monkeypatch, tmp_path / "home", "hf_writerWriterWriter")
        model.push_to_hub("me/codec")
        make(model).push_to_hub("me/codec")
        named = make(EncodecModel.from_pretrained("me/codec"), layout="codebook")
        named.push_to_hub("me/lm")
        files = hub.repositories["me/lm"].files()
        names = {"code_layouts", "code_vocabulary", "feature_extraction_encodec", "processing_encodec"}
        names |= {"inputs_encodec", "json_files_encodec", "upstream_encodec"}
        assert {name for name in files if name.endswith(".py")} == {f"{name}.py" for name in names}
        assert json.loads(files["processor_config.json"])["codec"] == "me/codec"
        assert equal(EncodecProcessor.from_pretrained("me/codec"), make(model))
        assert equal(EncodecProcessor.from_pretrained("me/lm"), named)
        for saved in (stereo, stereo.audio_tokenizer):
            saved.save_pretrained(tmp_path / "folder")
        torch.save(audio, tmp_path / "audio.pt")
        command = [sys.executable, "-c", ELSEWHERE, "me/codec", "me/lm", "folder"]
        environment = hub.environment(tmp_path / "elsewhere")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found = torch.load(tmp_path / "found.pt")
        for name, processor in {"me/codec": make(model), "me/lm": named, "folder": stereo}.items():
            ids, decoded = found[name]
            extractor = processor.feature_extractor
            assert torch.equal(
                ids, processor(audio.expand(extractor.feature_size, -1), extractor.sampling_rate)["input_ids"]
            )
            torch.testing.assert_close(decoded, processor.decode(ids, audio_scales=0.3)[0], rtol=0, atol=1e-6)
        assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == sorted(
            f"{name}.py" for name in names
        )
