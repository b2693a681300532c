"""The same audio gives the same codes, whatever the process around it is set to: autocast, default dtype and device,
precision of products, threads; and it is left as it was found."""

import ast
import copy
import io
import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import clip, noise
from fp32_precision import precisions
from safetensors.torch import load_file

from modeling_encodec import EncodecProcessor
from modeling_encodec.bitstream.compression import compress, compress_to_file, decompress
from modeling_encodec.bitstream.v0.language_model import encode_segment
from modeling_encodec.evaluation.metrics import mel_distance, si_snr
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.models.precision_encodec import call_with_threads, exact_float32
from modeling_encodec.models.quantization_encodec import kmeans
from modeling_encodec.processors.audio import write_audio
from modeling_encodec.processors.audio_tokens import _no_progress_bar
from modeling_encodec.processors.dataset_tokenization import CodecDetokenizer, CodecTokenizer
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.discriminator import MultiScaleSTFTDiscriminator
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.lm_trainer import LMTrainer
from modeling_encodec.training.losses import MelLoss
from modeling_encodec.training.run import new_model
from modeling_encodec.training.trainer import CodecTrainer


ROOT = Path(__file__).parents[1]


def stream(model: EncodecModel, audio: torch.Tensor, mode: str, hop: int) -> torch.Tensor:
    """Codes and audio of a stream, as one tensor."""
    encoder, decoder = StreamingEncoder(model, mode=mode), StreamingDecoder(model, mode=mode)
    given = []
    for piece in audio.split(hop, dim=2):
        codes = encoder.push(piece)
        given += [codes, decoder.push(codes, encoder.scales)]
    codes = encoder.flush()
    given += [codes, decoder.push(codes, encoder.scales), decoder.flush()]
    return torch.cat([part.double().flatten() for part in given])


@pytest.fixture(scope="module")
def jobs(small_models, lms, tmp_path_factory) -> dict:
    """What is computed here, by name: functions that give one tensor or array each, the same every time."""
    causal, chunked, looking = (small_models[name] for name in ("24khz", "48khz", "32khz"))
    lm, small_lm = lms["24khz"], lms["48khz"]
    folder = tmp_path_factory.mktemp("codec")
    chunked.save_pretrained(folder)
    mono, stereo = clip(causal, 0.5)[None], clip(chunked, 1.3)[None]
    codes, coded = causal.encode(mono, bandwidth=3.6).audio_codes, chunked.encode(stereo)
    rows, rows_mask = noise(3, 1, 4000), torch.arange(4000) < torch.tensor([[4000], [2300], [900]])
    tokenizer, processor = CodecTokenizer(causal, 3.6), EncodecProcessor.for_model(causal, bandwidth=1.8)
    row = {"array": mono[0, 0].numpy(), "sampling_rate": 24000}
    stereo_row = {"array": stereo[0].numpy(), "sampling_rate": 48000}
    detokenizer, tokens = CodecDetokenizer(causal, form="array"), {"codes": [codes[0, 0].numpy()]}
    ids = processor(mono[0], 24000)["input_ids"]
    data, data48 = compress(causal, mono[0], 3.6, lm), compress(chunked, stereo[0], 3.6)
    latents = torch.randn(1, 16, 300, generator=torch.Generator().manual_seed(0))
    mel, generator = MelLoss(24000), torch.Generator
    books = small_lm.config.num_codebooks
    few = torch.randint(64, (1, books, 40), generator=generator().manual_seed(1))

    def version_0():
        file = io.BytesIO()
        compress_to_file(causal, mono[0], file, 1.8, version=0)
        return list(file.getvalue())

    def started():
        quantizer = copy.deepcopy(causal.quantizer)
        quantizer.start_codebooks(latents, iterations=2, generator=generator().manual_seed(0))
        return quantizer.layers[1].codebook.embed

    def integer_form():
        integer = copy.deepcopy(small_lm).quantize(few).integer.state_dict()
        return torch.cat([table.double().flatten() for table in integer.values()])

    return {
        "encode": lambda: causal.encode(mono, bandwidth=3.6).audio_codes,
        "encode of a list": lambda: causal.encode(mono.tolist(), bandwidth=3.6).audio_codes,
        "encode of a short clip": lambda: causal.encode(mono[..., :3200], bandwidth=3.6).audio_codes,
        "encode of rows": lambda: causal.encode(rows, rows_mask).audio_codes,
        "encode, with latents": lambda: causal.encode(mono, return_latents=True).latents,
        "encode, 32 kHz": lambda: looking.encode(mono).audio_codes,
        "encode, 48 kHz": lambda: chunked.encode(stereo).audio_codes,
        "scales": lambda: torch.cat(chunked.encode(stereo).audio_scales),
        "decode": lambda: causal.decode(codes).audio_values,
        "decode of a list": lambda: causal.decode(codes.tolist()).audio_values,
        "decode, 48 kHz": lambda: chunked.decode(**coded).audio_values,
        "forward": lambda: causal(mono).audio_values,
        "embed": lambda: causal.embed(codes),
        "stream": lambda: stream(causal, mono, "exact", 2000),
        "stream, hop by hop": lambda: stream(causal, mono[..., :6400], "low_latency", 320),
        "stream, 48 kHz": lambda: stream(chunked, stereo, "exact", 20000),
        "from_pretrained": lambda: EncodecModel.from_pretrained(folder).eval().decode(**coded).audio_values,
        "compress": lambda: list(compress(chunked, stereo[0], 3.6)),
        "compress with a language model": lambda: list(compress(causal, mono[0], 3.6, lm)),
        "compress, version 0": version_0,
        "decompress": lambda: decompress(data48, chunked)[0],
        "decompress with a language model": lambda: decompress(data, causal, lm)[0],
        "CodecTokenizer": lambda: tokenizer({"audio": [row]})["codes"][0],
        "CodecTokenizer by name": lambda: CodecTokenizer(folder, 3.6)({"audio": [stereo_row]})["codes"][0],
        "CodecDetokenizer": lambda: detokenizer(tokens)["audio"][0]["array"],
        "EncodecProcessor": lambda: processor(mono[0], 24000)["input_ids"],
        "EncodecProcessor.decode": lambda: processor.decode(ids)[0],
        "frequencies": lambda: lm.frequencies(codes[0])[0],
        "logits": lambda: lm(codes[0]).logits,
        "bits": lambda: lm(codes[0], labels=codes[0]).codebook_bits,
        "predict": lambda: lm.predict(codes[0])[0],
        "a new integer form": integer_form,
        "original_lm": lambda: list(original_lm_bytes(codes)),
        "start_codebooks": started,
        "kmeans": lambda: kmeans(latents[0].T, 8, 3, generator().manual_seed(0))[0],
        "mel loss": lambda: mel(0.5 * mono, mono),
        "a new mel loss": lambda: MelLoss(24000)(0.5 * mono, mono),
        "mel_distance": lambda: mel_distance(mono, 0.5 * mono + 0.01, 24000),
        "si_snr": lambda: si_snr(mono, 0.5 * mono + 0.01),
    }


def original_lm_bytes(codes: torch.Tensor) -> bytes:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.device("cpu"):
        torch.manual_seed(0)
        lm = EncodecLM(EncodecLMConfig(codebook_size=64, num_codebooks=8, **size)).float().eval()
        for parameter in lm.parameters():  # of equal digits in every default dtype
            parameter.data.copy_(torch.linspace(-0.2, 0.3, parameter.numel(), dtype=torch.float32).view_as(parameter))
    return encode_segment(lm, codes[0, 0, :, :5])


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str | None = None):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16 by default": lambda: defaults(torch.float16),
    "bfloat16 by default": lambda: defaults(torch.bfloat16),
    "float64 by default": lambda: defaults(torch.float64),
    "another device by default": lambda: defaults(device="meta"),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@torch.no_grad()
def test_nothing_around_a_computation_changes_it(jobs, surrounding):
    wrong = {}
    for name, job in jobs.items():
        if surrounding == "another device by default" and name == "from_pretrained":
            continue  # Transformers refuses a meta device there
        wanted = job()
        try:
            with SURROUNDINGS[surrounding]():
                got = job()
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            continue
        if isinstance(wanted, torch.Tensor) and (got.dtype, got.device) != (wanted.dtype, wanted.device):
            wrong[name] = f"{got.dtype} on {got.device}"
        elif not np.array_equal(np.asarray(got), np.asarray(wanted)):
            wrong[name] = "other values"
    assert not wrong


@pytest.mark.parametrize(
    "surrounding",
    [
        "float16 by default",
        "another device by default",
        pytest.param("bfloat16 by default", marks=pytest.mark.slow),
        pytest.param("float64 by default", marks=pytest.mark.slow),
    ],
)
def test_training_follows_no_default(surrounding, tmp_path):
    """A codec's and a language model's first updates, from nothing."""
    audio = tmp_path / "audio"
    write_audio(audio / "clip.wav", noise(1, 1, 24000)[0].numpy(), 24000)
    weights = []
    for number, around in enumerate((nullcontext, SURROUNDINGS[surrounding])):
        folder = tmp_path / str(number)
        common = {"corpora": [{"name": "clips", "source": str(audio)}], "epochs": 1, "updates_per_epoch": 1}
        common |= {"batch_size": 2, "workers": 0, "trackers": [], "device": "cpu", "segment_seconds": 0.1}
        torch.manual_seed(0)
        with around():
            model = new_model(EncodecModel, EncodecConfig(num_filters=2, hidden_size=16, codebook_size=64))
            model.save_pretrained(folder / "start")
            codec = TrainingConfig(
                model=str(folder / "start"), output=str(folder / "codec"), discriminator_filters=2, **common
            )
            CodecTrainer(codec).train()
            lm = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            lm |= {"codec": str(folder / "codec" / "model"), "output": str(folder / "lm")}
            LMTrainer(LMTrainingConfig(**lm, **common)).train()
        weights.append([load_file(folder / kind / "model" / "model.safetensors") for kind in ("codec", "lm")])
    for ours, plain in zip(*weights):
        assert ours.keys() == plain.keys()
        assert all(torch.equal(ours[name], plain[name]) and ours[name].dtype == plain[name].dtype for name in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_new_models_take_the_default_dtype_as_modules_do_but_codebooks_stay_float32(dtype):
    with defaults(dtype):
        model = EncodecModel(EncodecConfig(num_filters=2, hidden_size=16)).eval()
        lm = EncodecLM(EncodecLMConfig(codebook_size=64, num_codebooks=2, hidden_size=16, num_hidden_layers=1)).eval()
        judge = MultiScaleSTFTDiscriminator(filters=2)
    assert model.dtype == lm.dtype == dtype
    assert {buffer.dtype for buffer in model.quantizer.buffers()} == {torch.float32}
    assert {tensor.dtype for tensor in judge.state_dict().values()} == {torch.float32}
    decoded = model(noise(1, 1, 3000), bandwidth=3.0).audio_values
    assert decoded.dtype == dtype and decoded.isfinite().all()
    assert lm(torch.zeros(1, 2, 5, dtype=torch.int64)).logits.isfinite().all()


FACTORIES = {
    **dict.fromkeys(("zeros", "ones", "empty", "full", "tensor", "scalar_tensor", "eye"), {"dtype", "device"}),
    **dict.fromkeys(("rand", "randn", "linspace", "logspace", "hann_window"), {"dtype", "device"}),
    **dict.fromkeys(("arange", "randint", "randperm", "as_tensor", "asarray"), {"device"}),
}


def test_every_tensor_that_is_made_says_its_dtype_and_device():
    """Modules are made where PyTorch's default device is, as modules are; their buffers say their dtype alone."""
    silent = []
    folders = [ROOT / name for name in ("modeling_encodec", "processors", "conversion")]
    for path in itertools.chain(*(folder.rglob("*.py") for folder in folders)):
        tree = ast.parse(path.read_text())
        inits = [node for node in ast.walk(tree) if getattr(node, "name", "") == "__init__"]
        own = {call for init in inits for call in ast.walk(init)}
        for node in ast.walk(tree):
            name = getattr(getattr(node, "func", None), "attr", None)
            if name not in FACTORIES or getattr(node.func.value, "id", None) != "torch":
                continue
            wanted = FACTORIES[name] - ({"device"} if node in own else set())
            if missing := wanted - {keyword.arg for keyword in node.keywords}:
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}: torch.{name} without {' and '.join(missing)}")
    assert not silent


# ---- threads -----------------------------------------------------------------------------------------------------

SETTINGS = (
    "pass",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'bf16'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'none'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.set_flags(_fp32_precision='bf16'); torch.backends.mkldnn.conv.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cudnn.allow_tf32 = False",
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each setting is tried in a fork of one process")
def test_an_inherited_precision_stays_inherited():
    """Beside a process that has never been in `exact_float32`: the same is inherited there, and the same is not."""
    command = [sys.executable, Path(__file__).parent / "fp32_precision.py", *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(SETTINGS)
    for setting, (without, within) in zip(SETTINGS, found):
        assert within == without, setting


def test_the_last_one_out_puts_precision_back():
    inside, leave, seen = threading.Event(), threading.Event(), []
    before = precisions()

    def first():
        with exact_float32():
            inside.set()
            leave.wait(10)
            seen.append(set(precisions()))

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with exact_float32(), pytest.raises(KeyError), exact_float32():
        raise KeyError
    assert set(precisions()) == {"ieee"}
    leave.set()
    thread.join()
    assert seen == [{"ieee"}] and precisions() == before


def test_a_generator_that_is_left_puts_back_what_it_holds():
    before = precisions()

    def steps():
        with exact_float32():
            yield 1
            yield 2

    left = steps()
    assert next(left) == 1 and set(precisions()) == {"ieee"}
    del left
    assert precisions() == before


def test_a_thread_count_is_one_threads_own():
    """Neither the caller sees it, nor a thread that computes beside it, nor one that begins meanwhile."""
    before = torch.get_num_threads()

    def within():
        return torch.get_num_threads(), call_in(ThreadPoolExecutor(1)), call_with_threads(2, torch.get_num_threads)

    def call_in(pool):
        with pool:
            return pool.submit(torch.get_num_threads).result()

    try:
        torch.set_num_threads(3)
        beside = ThreadPoolExecutor(1)
        assert beside.submit(torch.get_num_threads).result() == 3
        assert call_with_threads(1, within) == (1, 3, 2)
        assert call_with_threads(3, threading.get_ident) == threading.get_ident()  # no other thread is needed
        with pytest.raises(ZeroDivisionError):
            call_with_threads(1, lambda: 1 / 0)
        assert torch.get_num_threads() == call_in(beside) == call_in(ThreadPoolExecutor(1)) == 3
    finally:
        torch.set_num_threads(before)


def test_threads_that_begin_beside_a_coder_with_a_language_model_have_the_processs_count():
    """Version 0 is computed by one thread; a new thread of another's must not be given that count."""
    before, stop, seen = torch.get_num_threads(), threading.Event(), Counter()

    def code():
        while not stop.is_set():
            call_with_threads(1, torch.get_num_threads)

    try:
        torch.set_num_threads(2)
        call_with_threads(1, torch.get_num_threads)
        coder = threading.Thread(target=code)
        coder.start()
        for _ in range(5000):
            new = threading.Thread(target=lambda: seen.update([torch.get_num_threads()]))
            new.start()
            new.join()
        stop.set()
        coder.join()
        assert seen == {2: 5000}
    finally:
        torch.set_num_threads(before)


def test_many_threads_give_the_codes_of_one_and_leave_everything_as_it_was(jobs):
    names = ["encode", "encode, 48 kHz", "decode", "stream", "compress with a language model", "original_lm"]
    names += ["decompress with a language model", "CodecTokenizer", "CodecTokenizer by name", "logits"]
    before, bars = precisions(), transformers.utils.logging.is_progress_bar_enabled()
    threads = torch.get_num_threads()

    def run(number: int) -> list[str]:
        wrong = []
        for name in names[number * 3 :] + names[: number * 3]:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
                if not np.array_equal(np.asarray(jobs[name]()), wanted[name]):
                    wrong.append(name)
        return [*wrong, *([] if torch.get_num_threads() == 2 else ["thread count"])]

    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            wanted = {name: np.asarray(jobs[name]()) for name in names}
        with ThreadPoolExecutor(4) as pool:
            assert not sum(pool.map(run, range(4)), [])
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(threads)
    assert precisions() == before and transformers.utils.logging.is_progress_bar_enabled() == bars


def test_progress_bars_come_back_when_the_last_model_is_loaded():
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    try:
        with _no_progress_bar.held():
            with _no_progress_bar.held():
                pass
            assert not bars.is_progress_bar_enabled()
        assert bars.is_progress_bar_enabled()
    finally:
        (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
