"""A process that has computed with several threads and forks; and one that computes for long keeps nothing."""

import gc
import hashlib
import io
import os
import sys
import threading
import time

import pytest
import torch
from conftest import clip, noise
from in_a_fork import in_a_fork
from lm_models import make_lm
from pipe_ends import Sink
from torch.utils.data import DataLoader

from modeling_encodec.bitstream.codes_file import EcdcReader, EcdcWriter
from modeling_encodec.bitstream.compression import compress, decompress, read_codes
from modeling_encodec.bitstream.live import decode_live
from modeling_encodec.bitstream.v0.language_model import decode_segment, encode_segment
from modeling_encodec.models.precision_encodec import SharedSetting
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def work(small_models, lms):
    """What is computed before a fork and after it: codes, and files with integer and float language models."""
    model, lm = small_models["24khz"], lms["24khz"]
    audio, float_lm = clip(model, 2.0), make_lm()
    codes = noise(1, 4, 30)[0].abs().mul(100).long() % 16

    @torch.no_grad()
    def compute() -> list[str]:
        coded = model.encode(audio[None], num_quantizers=2).audio_codes
        assert model.decode(coded).audio_values.isfinite().all()
        data = compress(model, audio, 3.6, lm)
        assert decompress(data, model, lm, strict=True)[0].shape == audio.shape
        original = encode_segment(float_lm, codes)
        assert (decode_segment(float_lm, io.BytesIO(original), 4, 30) == codes.numpy()).all()
        return [hashlib.sha256(part).hexdigest() for part in (coded.numpy().tobytes(), data, original)]

    return compute


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@needs_fork
def test_a_fork_of_a_process_that_has_computed_computes_the_same(work, two_threads):
    expected = work()
    assert in_a_fork(work) == expected
    assert in_a_fork(torch.get_num_threads) == 1 and torch.get_num_threads() == 2
    assert in_a_fork(lambda: in_a_fork(work)) == expected  # and a fork of that
    assert work() == expected


@needs_fork
def test_a_fork_beside_a_thread_that_computes(work, two_threads):
    """Whatever the other thread is at: its locks are not left behind, taken."""
    expected, stop = work(), threading.Event()

    def busy():
        while not stop.is_set():
            work()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(3):
            assert in_a_fork(work) == expected
    finally:
        stop.set()
        thread.join()
    assert work() == expected


class Clips(torch.utils.data.Dataset):
    """Codes, computed where an item is asked for."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    @torch.no_grad()
    def __getitem__(self, number):
        return self.model.encode(noise(1, 1, 9000, seed=number)).audio_codes[0, 0]


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_forked_workers_of_a_data_loader_encode(small_models, two_threads):
    clips = Clips(small_models["24khz"])
    expected = [clips[number] for number in range(4)]
    loader = DataLoader(clips, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(one, other) for one, other in zip(loader, expected, strict=True))


@needs_fork
def test_a_fork_waits_for_other_threads_alone_and_not_forever(monkeypatch):
    """And a child finds the setting as it is without what other threads held."""
    settings = {"value": "before"}

    def change():
        settings["value"] = "held"
        return lambda: settings.update(value="before")

    shared = SharedSetting(change)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with shared.held():
            inside.set()
            leave.wait(60)

    with shared.held():  # by the thread that forks
        assert in_a_fork(lambda: settings["value"]) == "held"
    assert settings["value"] == "before"
    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    monkeypatch.setattr(SharedSetting, "MAX_WAIT", 0.2)

    def child():
        seen = [settings["value"]]
        with shared.held():
            seen.append(settings["value"])
        return [*seen, settings["value"]]

    start = time.monotonic()
    assert in_a_fork(child) == ["before", "held", "before"]
    assert 0.2 < time.monotonic() - start < 30
    monkeypatch.setattr(SharedSetting, "MAX_WAIT", 60.0)
    threading.Timer(0.3, leave.set).start()
    start = time.monotonic()
    assert in_a_fork(lambda: settings["value"]) == "before"
    assert 0.2 < time.monotonic() - start < 30
    thread.join()


# ---- what stays ---------------------------------------------------------------------------------------------------


def cycle(model, lm, audio: torch.Tensor, original_lm, number: int) -> None:
    """Everything that opens, computes or fails, once."""
    data = compress(model, audio, 3.6, lm, segment_seconds=0.1)
    assert decompress(data, model, lm, strict=True)[0].shape == audio.shape
    spoilt = bytearray(data)
    spoilt[-100] ^= 1
    read_codes(io.BytesIO(spoilt), model, lm, on_damage=lambda damage: None)
    for bad in (data[:50], data[:-300], spoilt):
        with pytest.raises(ValueError):
            decompress(bad, model, lm, strict=True)
    encoder, decoder = StreamingEncoder(model, num_quantizers=2), StreamingDecoder(model)
    decoder.push(encoder.push(audio[None, :, :1000]))  # and left in the middle
    writer = EcdcWriter(Sink(), model, num_codebooks=2, model_name="m")
    writer.write(torch.zeros(2, 5, dtype=torch.int64).numpy())
    next(EcdcReader(io.BytesIO(data)).read(model, lm))
    decode_live(lambda header: (model, lm), io.BytesIO(spoilt), io.BytesIO(), on_damage=lambda *_: None)
    if not number % 10:
        encode_segment(original_lm, torch.zeros(4, 2, dtype=torch.int64))


def held() -> dict[str, int]:
    """Open files, threads and tensors of this process."""
    gc.collect()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    return {"files": files, "threads": threading.active_count(), "tensors": tensors}


def resident() -> float:
    """Megabytes of memory in use."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.no_grad()
def leaks(small_models, lms, cycles: int) -> None:
    model, lm, original_lm = small_models["24khz"], lms["24khz"], make_lm()
    audio = clip(model, 0.3)
    for number in range(cycles // 5):
        cycle(model, lm, audio, original_lm, number)
    before, memory = held(), resident() if sys.platform == "linux" else 0
    for number in range(cycles):
        cycle(model, lm, audio, original_lm, number)
    assert held() == before
    assert sys.platform != "linux" or resident() - memory < 10


def test_fifty_cycles_leave_nothing(small_models, lms):
    leaks(small_models, lms, 50)


@pytest.mark.slow
def test_three_hundred_cycles_leave_nothing(small_models, lms):
    leaks(small_models, lms, 300)
