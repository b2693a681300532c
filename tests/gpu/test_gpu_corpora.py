"""Tokens of corpora on a GPU: those of the CPU, by every way of making them."""

import copy

import numpy as np
import pytest
import torch
from conftest import noise
from datasets import Dataset
from devices import REAL, assert_near, assert_same_codes
from in_a_fork import in_a_fork

from modeling_encodec import CodecDetokenizer, CodecTokenizer, EncodecProcessor
from modeling_encodec.processors.audio_tokens import PortableCodec, decode_tokens, encode_clips
from modeling_encodec.processors.corpus.tokenization import _LongClip


pytestmark = pytest.mark.usefixtures("device")
BOTH = pytest.mark.parametrize("name", ["24khz", "48khz"])
CHUNKS_SLOW = pytest.mark.parametrize("name", ["24khz", pytest.param("48khz", marks=pytest.mark.slow)])


@pytest.fixture
def model(small_models, name):
    return small_models[name]


@pytest.fixture
def clips(model) -> list[np.ndarray]:
    rate, channels = model.config.sampling_rate, model.config.audio_channels
    return [noise(1, channels, n, seed=n)[0].numpy() for n in (rate, rate // 2, 700, int(1.2 * rate))]


@pytest.fixture
def dataset(model, clips):
    rate = model.config.sampling_rate
    return Dataset.from_dict({"audio": [{"array": clip, "sampling_rate": rate} for clip in clips]})


@BOTH
def test_clips_to_tokens_and_back(model, clips):
    there = copy.deepcopy(model).to("cuda")
    ours, theirs = encode_clips(there, clips, 2), encode_clips(model, clips, 2)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_same_codes(mine.codes, expected.codes)
        assert mine.audio_length == expected.audio_length
        if expected.scales is not None:
            assert_near(mine.scales, expected.scales)
    for mine, expected in zip(decode_tokens(there, theirs), decode_tokens(model, theirs), strict=True):
        assert_near(mine, expected)


@CHUNKS_SLOW
@pytest.mark.parametrize("where", ["cuda", pytest.param(None, marks=pytest.mark.slow)])
def test_data_sets(model, dataset, where):
    count = 2
    ours = CodecTokenizer(model, num_quantizers=count, device=where).map(dataset)
    theirs = CodecTokenizer(model, num_quantizers=count, device="cpu").map(dataset)
    assert_columns(ours, theirs)
    sounds = [
        CodecDetokenizer(model, device=device, form="array").map(theirs)["audio"][:] for device in (where, "cpu")
    ]
    for mine, expected in zip(*sounds, strict=True):
        assert_near(np.asarray(mine["array"]), np.asarray(expected["array"]))


def assert_columns(ours, theirs) -> None:
    assert ours["audio_length"][:] == theirs["audio_length"][:]
    for mine, expected in zip(ours["codes"][:], theirs["codes"][:], strict=True):
        assert_same_codes(np.asarray(mine), np.asarray(expected))


@pytest.mark.parametrize("name", ["24khz"])
@pytest.mark.parametrize("where", ["cuda", "cuda:1", None])
def test_ranks_take_the_gpus_by_turns(second_device, model, where):
    codec = CodecTokenizer(model, num_quantizers=2, device=where)
    devices = [str(codec._model(rank).device) for rank in range(3)]
    assert devices == ["cuda:1"] * 3 if where == "cuda:1" else devices == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.parametrize("name", ["24khz"])
def test_forked_children_say_what_to_do(model, dataset, device):
    """`datasets.map(num_proc)` forks, and CUDA does not survive that."""
    tokenizer = CodecTokenizer(model, num_quantizers=2, device="cuda")
    tokenizer(dataset[:1])  # the parent has used CUDA

    def child():
        with pytest.raises(
            ValueError, match=r'forked after CUDA was used, allowed: cpu, .*set_start_method\("spawn"\)'
        ):
            CodecTokenizer(model, num_quantizers=2, device="cuda")(dataset[:1])
        return CodecTokenizer(model, num_quantizers=2, device="cpu")(dataset[:1])["frames"]

    assert in_a_fork(child) == [75]


@pytest.mark.parametrize("name", ["24khz"])
def test_a_model_in_use_does_not_survive_a_fork_either(model, dataset, device):
    tokenizer = CodecTokenizer(model, num_quantizers=2, device="cuda")
    tokenizer(dataset[:1])

    def child():
        with pytest.raises(ValueError, match=r'set_start_method\("spawn"\)'):
            tokenizer(dataset[:1])
        return True

    assert in_a_fork(child)


@pytest.mark.parametrize("name", ["24khz"])
def test_one_codec_on_several_devices(second_device, model):
    codec = PortableCodec(model)
    assert [str(codec.on(where).device) for where in ("cuda:1", "cpu", "cuda:0")] == ["cuda:1", "cpu", "cuda:0"]
    assert codec.on("cuda:1") is codec.on("cuda:1")


@BOTH
def test_long_clips_in_blocks(model, clips):
    there, clip = copy.deepcopy(model).to("cuda"), clips[3]
    long = _LongClip(there, 2)
    blocks = torch.from_numpy(clip).to("cuda").split(model.config.sampling_rate // 3, dim=1)
    for number, block in enumerate(blocks):
        long.push(block, number == len(blocks) - 1)
    (expected,) = encode_clips(model, [clip], 2)
    assert_same_codes(long.tokens().codes, expected.codes)


@CHUNKS_SLOW
@pytest.mark.parametrize(
    "layout", ["frame", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("codebook", "delay"))]
)
def test_processor(model, clips, layout):
    there, rate = copy.deepcopy(model).to("cuda"), model.config.sampling_rate
    given = [clip[0] if model.config.audio_channels == 1 else clip for clip in clips[:2]]
    ours, theirs = (EncodecProcessor.for_model(one, num_quantizers=2, layout=layout) for one in (there, model))
    batch, expected = (one(given, rate, return_labels=False) for one in (ours, theirs))
    ids = torch.as_tensor(expected["input_ids"])
    if not REAL:
        assert torch.equal(torch.as_tensor(batch["input_ids"]), ids)
    options = {"audio_scales": 1.0 if model.config.normalize else None, "incomplete": "drop"}
    sounds = theirs.decode(ids, **options)
    for form in (ids, ids.to("cuda"), list(ids.to("cuda")), ids.tolist()):
        for mine, sound in zip(ours.decode(form, **options), sounds, strict=True):
            assert_near(mine, sound)
