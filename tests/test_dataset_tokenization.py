"""`datasets` datasets to tokens and back: the same codes whoever maps, caches that are found, rows without audio."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_model, noise
from corpus_files import BAD, GOOD, sound, write_corpus
from datasets import Audio, Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_from_disk
from datasets.fingerprint import Hasher

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.dataset_tokenization import (
    CodecDetokenizer,
    CodecTokenizer,
    load_tokens,
    provenance_of,
)


NAMES = sorted({**GOOD, **BAD})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_models):
    place = tmp_path_factory.mktemp("model") / "small"
    small_models["24khz"].save_pretrained(place)
    return place


@pytest.fixture
def clips(corpus):
    """A dataset with an Audio column, of good and bad files."""
    rows = {"audio": [str(corpus / name) for name in NAMES], "text": NAMES}
    return Dataset.from_dict(rows).cast_column("audio", Audio())


def rows_of(dataset) -> dict:
    return {row["text"]: np.asarray(row["codes"]).tolist() for row in dataset.with_format("numpy")}


def expected(model, corpus, count: int) -> dict:
    made = {}
    for name in GOOD:
        audio, _ = read_audio(corpus / name, model.config.sampling_rate, model.config.audio_channels)
        made[name] = model.encode(torch.from_numpy(audio)[None], num_quantizers=count).audio_codes[0, 0].tolist()
    return made


def test_all_ways_of_mapping_give_the_codes_of_encode(clips, corpus, folder, small_models):
    tokenizer = CodecTokenizer(folder, 3.6)
    want = expected(small_models["24khz"], corpus, tokenizer.num_quantizers)
    plain = clips.cast_column("audio", Audio(decode=False))
    raw = plain.map(
        tokenizer, batched=True, with_rank=True, batch_size=5, remove_columns=["audio"],
        features=Features({"text": Value("string"), **tokenizer.features}),
    )  # fmt: skip
    ways = {
        "one by one": tokenizer.map(clips, batch_size=1),
        "all at once": tokenizer.map(clips, batch_size=100),
        "two processes": tokenizer.map(clips, batch_size=3, num_proc=2),
        "a stream": tokenizer.map(clips.to_iterable_dataset(num_shards=3), batch_size=4),
        "the callable": raw.filter(lambda error: error is None, input_columns="error"),
        "a model in memory": CodecTokenizer(small_models["24khz"], num_quantizers=8).map(clips),
    }
    assert tokenizer.num_quantizers == 8
    for way, dataset in ways.items():
        assert rows_of(dataset) == want, way
    assert dict(zip(raw["text"], raw["error"]))["a/mono.wav"] is None
    for name, reason in BAD.items():
        assert reason in raw[NAMES.index(name)]["error"]


def test_loader_workers_give_the_same(clips, folder):
    tokenizer = CodecTokenizer(folder, 3.6)
    stream = tokenizer.map(clips.to_iterable_dataset(num_shards=2), batch_size=2)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert {row["text"]: np.asarray(row["codes"]).tolist() for row in loader} == rows_of(tokenizer.map(clips))


def test_processes_that_are_spawned_give_the_same(corpus, folder, clips, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocess, sys\n"
        "from datasets import Dataset\n"
        "from modeling_encodec.processors.dataset_tokenization import CodecTokenizer\n"
        "if __name__ == '__main__':\n"
        "    multiprocess.set_start_method('spawn')\n"
        "    paths = sys.argv[2:-1]\n"
        "    dataset = Dataset.from_dict({'audio': paths, 'text': paths})\n"
        "    CodecTokenizer(sys.argv[1], 3.6).map(dataset, num_proc=2, batch_size=2).save_to_disk(sys.argv[-1])\n"
    )
    paths = [str(corpus / name) for name in GOOD]
    subprocess.run([sys.executable, script, folder, *paths, tmp_path / "made"], check=True, capture_output=True)
    made = rows_of(load_from_disk(tmp_path / "made"))
    want = rows_of(CodecTokenizer(folder, 3.6).map(clips))
    assert [made[path] for path in paths] == [want[name] for name in GOOD]


def test_columns_are_as_declared(clips, folder):
    tokenizer = CodecTokenizer(folder, 1.8)
    tokens = tokenizer.map(clips)
    kinds = {"codes": List(List(Value("uint16"))), "frames": Value("int32"), "audio_length": Value("int64")}
    assert tokens.features == Features({"text": Value("string"), **kinds})
    assert tokenizer.features == Features({**kinds, "error": Value("string")})
    streamed = tokenizer.map(clips.to_iterable_dataset())
    assert streamed.features == tokens.features
    row = dict(zip(tokens["text"], tokens))["b/telephone.wav"]
    assert (row["audio_length"], row["frames"]) == (18000, 57) and np.shape(row["codes"]) == (4, 57)


def test_second_map_finds_the_cache_and_another_setting_does_not(clips, folder, small_models, tmp_path, monkeypatch):
    clips.save_to_disk(tmp_path / "clips")
    clips = load_from_disk(tmp_path / "clips")
    first = CodecTokenizer(folder, 3.6).map(clips)
    calls = []
    monkeypatch.setattr(CodecTokenizer, "__call__", lambda *_: calls.append(1))
    again = CodecTokenizer(folder, 3.6).map(clips)
    assert not calls and rows_of(again) == rows_of(first) and again._fingerprint == first._fingerprint
    assert provenance_of(again) == provenance_of(first)
    for other in (
        CodecTokenizer(folder, 1.8),
        CodecTokenizer(folder, 3.6, precision="fast"),
        CodecTokenizer(make_model(small_models["24khz"].config, seed=9), 3.6),
    ):
        with pytest.raises(KeyError, match="error"):  # the callable above makes no columns
            other.map(clips)
        assert calls.pop() and not calls


def test_pickles_are_equal_for_equal_weights_in_any_process(folder, small_models):
    tokenizer = CodecTokenizer(folder, 3.6)
    code = (
        "import sys; from datasets.fingerprint import Hasher\n"
        "from modeling_encodec.processors.dataset_tokenization import CodecTokenizer\n"
        "print(Hasher.hash(CodecTokenizer(sys.argv[1], 3.6)))"
    )
    there = [
        subprocess.run(
            [sys.executable, "-c", code, folder],
            env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]  # fmt: skip
    tokenizer(
        {"audio": [{"array": np.zeros(500, np.float32), "sampling_rate": 24000}]}
    )  # a loaded model changes nothing
    assert there == [Hasher.hash(tokenizer)] * 2
    model = small_models["24khz"]
    in_memory = [pickle.dumps(CodecTokenizer(model, 3.6)) for _ in range(2)]
    assert in_memory[0] == in_memory[1]
    copy = pickle.loads(in_memory[0])
    batch = {"audio": [{"array": sound(24000, 1, 3000)[:, 0], "sampling_rate": 24000}]}
    assert np.array_equal(copy(batch)["codes"][0], tokenizer(batch)["codes"][0])


def test_changed_weights_under_the_same_name_are_noticed(folder, small_models, tmp_path):
    small_models["24khz"].save_pretrained(tmp_path / "mine")
    sent = pickle.dumps(CodecTokenizer(tmp_path / "mine", 3.6))
    make_model(small_models["24khz"].config, seed=9).save_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="model 'mine' has changed"):
        pickle.loads(sent)({"audio": [{"array": np.zeros(500, np.float32), "sampling_rate": 24000}]})


def test_skipped_rows_are_listed_and_logged(clips, folder, caplog):
    tokens = CodecTokenizer(folder, 3.6).map(clips)
    assert tokens["text"][:] == [name for name in NAMES if name in GOOD]
    listed = {NAMES[entry["row"]]: entry["reason"] for entry in provenance_of(tokens)["skipped"]}
    assert listed.keys() == BAD.keys() and all(BAD[name] in reason for name, reason in listed.items())
    assert not any(str(clips) in reason for reason in listed.values())
    caplog.clear()
    list(CodecTokenizer(folder, 3.6).map(clips.to_iterable_dataset()))
    assert sum("skipped" in line for line in caplog.messages) == len(BAD)
    bad = clips.select([NAMES.index(name) for name in BAD])
    with pytest.raises(ValueError, match=f"none of {len(BAD)} rows give audio, the first: not readable as audio"):
        CodecTokenizer(folder, 3.6).map(bad)


class Decoder:
    """As torchcodec's."""

    def __init__(self, samples, rate):
        self.samples, self.rate = samples, rate

    def get_all_samples(self):
        if self.samples is None:
            raise RuntimeError("no stream\nfound")
        return type("Samples", (), {"data": torch.from_numpy(self.samples.T.copy()), "sample_rate": self.rate})


def test_rows_that_others_decoded(folder, small_models):
    tokenizer, samples = CodecTokenizer(folder, 3.6), sound(24000, 2, 5000)
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, 24000, format="WAV", subtype="FLOAT")
    good = [
        {"array": samples.T, "sampling_rate": 24000},
        {"array": samples.T.astype(np.float64), "sampling_rate": 24000, "path": "x.wav"},
        {"array": samples.mean(1).tolist(), "sampling_rate": 24000},
        encoded.getvalue(),
        {"bytes": encoded.getvalue(), "path": "x.flac"},
        Decoder(samples, 24000),
    ]
    bad = {
        "looks transposed": {"array": samples, "sampling_rate": 24000},
        "sampling_rate is None": {"array": samples.T},
        "allowed: floating point": {"array": np.zeros(50, object), "sampling_rate": 24000},
        "allowed: (samples,) or": {"array": np.zeros((1, 1, 50)), "sampling_rate": 24000},
        "NaN": {"array": np.full(50, np.nan), "sampling_rate": 24000},
        "no stream found": Decoder(None, 0),
        "audio is a NoneType": None,
        "audio is a int": 3,
    }
    made = tokenizer({"audio": good + list(bad.values())}, rank=1)
    assert all(np.array_equal(codes, made["codes"][0]) for codes in made["codes"][:6])
    assert made["codes"][0].dtype == np.uint16 and made["error"][:6] == [None] * 6
    for reason, error, codes in zip(bad, made["error"][6:], made["codes"][6:]):
        assert reason in error and codes.size == 0


@pytest.mark.parametrize("name", ["24khz", "48khz", "32khz"])
def test_back_to_audio_is_decode(name, small_models):
    model = small_models[name]
    config = model.config
    lengths = [1, 5000, int(2.3 * config.sampling_rate), config.sampling_rate]
    audio = [noise(1, config.audio_channels, length, seed=length)[0].numpy() for length in lengths]
    rows = [{"audio": {"array": clip.tolist(), "sampling_rate": config.sampling_rate}} for clip in audio]
    tokens = CodecTokenizer(model, config.target_bandwidths[-1]).map(Dataset.from_list(rows))
    assert ("scales" in tokens.column_names) == config.normalize
    decoded = CodecDetokenizer(model, form="array").map(tokens, batch_size=3).with_format("numpy")
    as_wav = CodecDetokenizer(model).map(tokens)
    for clip, row, wav in zip(audio, decoded, as_wav):
        coded = model.encode(torch.from_numpy(clip)[None], bandwidth=config.target_bandwidths[-1])
        with torch.no_grad():  # with gradients the rounding is another
            want = model.decode(**coded).audio_values[0].numpy()
        assert np.array_equal(np.stack(row["audio"]["array"]).reshape(want.shape), want)
        samples, rate = soundfile.read(io.BytesIO(wav["audio"]["bytes"]), always_2d=True)
        assert rate == config.sampling_rate and np.abs(samples.T - want.clip(-1, 1)).max() < 1e-4
    streamed = CodecDetokenizer(model).map(tokens.to_iterable_dataset())
    assert [row["audio"]["bytes"] for row in streamed] == [row["audio"]["bytes"] for row in as_wav]
    as_wav.cast_column("audio", Audio())  # what plays it


def test_provenance_stays_with_the_dataset(clips, folder, small_models, tmp_path):
    tokenizer = CodecTokenizer(folder, 3.6)
    tokens = tokenizer.map(clips)
    tokens.select(range(3)).filter(lambda frames: frames > 2, input_columns="frames").save_to_disk(tmp_path / "saved")
    saved = load_from_disk(tmp_path / "saved")
    assert provenance_of(saved) == provenance_of(tokens)
    about = provenance_of(saved)
    assert about["model"] == "small" and about["sampling_rate"] == 24000 and about["bandwidth_kbps"] == 3.6
    assert about["num_quantizers"] == 8 and about["precision"] == "exact" and len(about["model_fingerprint"]) == 16
    assert provenance_of(concatenate_datasets([tokens, saved]))["num_quantizers"] == 8
    with pytest.raises(ValueError, match="holds tokens of 2 kinds"):
        provenance_of(concatenate_datasets([tokens, CodecTokenizer(folder, 1.8).map(clips)]))
    assert provenance_of(clips) is None
    other = make_model(small_models["24khz"].config, seed=9)
    with pytest.raises(ValueError, match="tokens are of codebooks"):
        CodecDetokenizer(other).map(tokens)


def test_dictionary_of_splits(clips, folder):
    both = CodecTokenizer(folder, 3.6).map(DatasetDict(train=clips, test=clips.select([NAMES.index("z.wav")])))
    assert list(both) == ["train", "test"] and both["test"][0]["audio_length"] == 3
    assert both["train"].num_rows == len(GOOD)


def test_long_rows_beside_short_ones(tmp_path, small_models):
    model = small_models["24khz"]
    soundfile.write(tmp_path / "long.flac", sound(24000, 1, 180 * 24000), 24000)
    soundfile.write(tmp_path / "short.wav", sound(24000, 1, 2400), 24000)
    dataset = Dataset.from_dict({"audio": [str(tmp_path / "long.flac"), str(tmp_path / "short.wav")]})
    tokens = CodecTokenizer(model, 0.9).map(dataset).with_format("numpy")
    for row, path in zip(tokens, dataset["audio"]):
        audio, _ = read_audio(path)
        assert np.array_equal(
            row["codes"], model.encode(torch.from_numpy(audio)[None], bandwidth=0.9).audio_codes[0, 0]
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"bandwidth is not given, allowed: one of \[0.9, 1.8, 3.6\] kbps, or num_quantizers"),
        ({"bandwidth": 5.0}, "doesn't support the bandwidth 5.0"),
        ({"num_quantizers": 99}, "num_quantizers is 99, allowed: 1 to"),
        ({"bandwidth": 0.9, "num_quantizers": 2}, "allowed: one"),
        ({"bandwidth": 0.9, "precision": "quick"}, "precision is 'quick', allowed: exact, fast"),
        ({"bandwidth": 0.9, "batch_seconds": 0}, "batch_seconds is 0, allowed: above 0"),
    ],
)
def test_settings_that_cannot_work(folder, options, message):
    with pytest.raises(ValueError, match=message):
        CodecTokenizer(folder, **options)


def test_datasets_that_cannot_be_tokenised(folder, clips):
    tokenizer = CodecTokenizer(folder, 0.9)
    with pytest.raises(ValueError, match="column is 'audio', allowed: sound, text"):
        tokenizer.map(clips.rename_column("audio", "sound"))
    assert len(CodecTokenizer(folder, 0.9, column="sound").map(clips.rename_column("audio", "sound"))) == len(GOOD)
    with pytest.raises(ValueError, match="dataset has a column 'codes', allowed: none of codes"):
        tokenizer.map(clips.rename_column("text", "codes"))
    with pytest.raises(ValueError, match="dataset is a list, allowed: a dataset"):
        tokenizer.map([1])
    with pytest.raises(ValueError, match="num_proc is 2 of a stream"):
        tokenizer.map(clips.to_iterable_dataset(), num_proc=2)
    with pytest.raises(ValueError, match="device is 'nowhere'"):
        CodecTokenizer(folder, 0.9, device="nowhere")({"audio": [{"array": np.zeros(9), "sampling_rate": 24000}]})
    with pytest.raises(ValueError, match="form is 'mp3', allowed: wav, array"):
        CodecDetokenizer(folder, form="mp3")
    with pytest.raises(ValueError, match="codes have 5 frames for 20 samples, allowed: 1"):
        CodecDetokenizer(folder)({"codes": [np.zeros((2, 5), np.uint16)], "audio_length": [20]})
    with pytest.raises(ValueError, match="audio_length is None, allowed: a whole number"):
        CodecDetokenizer(folder)({"codes": [np.zeros((2, 5), np.uint16)], "audio_length": [None]})
    with pytest.raises(ValueError, match="codes of row 0 are ragged"):
        CodecDetokenizer(folder)({"codes": [[[1, 2], [3]]], "audio_length": [500]})


def test_codes_of_large_codebooks(small_models, run, tmp_path):
    large = {"codebook_size": 70000, "target_bandwidths": [1.275]}  # one codebook
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**small_models["24khz"].config.to_diff_dict() | large)).eval()
    torch.nn.init.normal_(model.quantizer.layers[0].codebook.embed, std=0.1)
    audio = sound(24000, 1, 48000)[:, 0]
    want = model.encode(torch.from_numpy(audio)).audio_codes[0, 0].numpy()
    assert want.max() > 1 << 16
    dataset = Dataset.from_list([{"audio": {"array": audio.tolist(), "sampling_rate": 24000}}])
    tokens = CodecTokenizer(model).map(dataset).with_format("numpy")
    assert np.array_equal(tokens[0]["codes"], want)
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "a.wav", audio, 24000, subtype="FLOAT")
    model.save_pretrained(tmp_path / "model")
    assert run("tokenize", tmp_path / "clips", tmp_path / "out", "-m", tmp_path / "model", "--workers", 0)[0] == 0
    assert np.array_equal(load_tokens(tmp_path / "out").with_format("numpy")[0]["codes"], want)


def test_a_relative_folder_is_found_from_elsewhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    sent = pickle.dumps(CodecTokenizer(folder.name, 3.6))
    monkeypatch.chdir(tmp_path)
    made = pickle.loads(sent)({"audio": [{"array": np.zeros(500), "sampling_rate": 24000}]})
    assert made["frames"] == [2]


def test_a_cpu_computes_with_one_thread_and_has_its_own_again(small_models, monkeypatch):
    seen, encode_pieces = [], type(small_models["24khz"]).encode_pieces

    def watched(*given):
        seen.append(torch.get_num_threads())
        return encode_pieces(*given)

    monkeypatch.setattr(type(small_models["24khz"]), "encode_pieces", watched)
    tokenizer, before = CodecTokenizer(small_models["24khz"], 3.6), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        tokenizer({"audio": [{"array": np.zeros(500), "sampling_rate": 24000}]})
        assert seen == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_model_with_one_bandwidth_needs_no_choice(small_models):
    config = EncodecConfig(**small_models["24khz"].config.to_diff_dict() | {"target_bandwidths": [1.8]})
    assert CodecTokenizer(make_model(config)).num_quantizers == 4
