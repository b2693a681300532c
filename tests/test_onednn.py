"""What a process keeps of compiled convolutions is bounded, for every use of the package, and costs nothing."""

import os
import subprocess
import sys

import pytest

from modeling_encodec.models.onednn_encodec import KERNELS, SETTINGS


BARE = {name: value for name, value in os.environ.items() if name not in SETTINGS} | {"OMP_NUM_THREADS": "1"}

MODEL = """
import sys, torch
from modeling_encodec import EncodecConfig, EncodecModel
torch.set_num_threads(1)
model = EncodecModel(EncodecConfig(num_filters=8, hidden_size=16, num_lstm_layers=1)).eval()

def encode(samples):
    print("of", samples, flush=True)
    with torch.no_grad():
        model.encode(torch.zeros(1, 1, samples), bandwidth=1.5)
"""


def run(script: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], env=BARE | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_limit_is_set_at_import_and_never_over_a_users():
    show = "import os, sys, modeling_encodec; print([os.environ.get(n) for n in sys.argv[1:]], 'torch' in sys.modules)"
    show = show.replace("sys.argv[1:]", repr(SETTINGS))
    assert run(show) == f"{[KERNELS, None]} False\n"
    assert run(show, **{SETTINGS[0]: "7"}) == "['7', None] False\n"
    assert run(show, **{SETTINGS[1]: "9"}) == "[None, '9'] False\n"


def misses(told: str) -> list[int]:
    """Convolutions that were compiled for each length, in order."""
    parts = told.split("of ")[1:]
    return [part.count("create:cache_miss") for part in parts]


def test_kernels_are_dropped_and_one_length_needs_few():
    script = MODEL + "for samples in [24000, 24000, *range(30000, 30000 + 320 * 150, 320), 24000]: encode(samples)"
    first, again, *others, last = misses(run(script, ONEDNN_VERBOSE="profile_create"))
    if not first:
        pytest.skip("this build of PyTorch says nothing of its kernels")
    assert again == 0 and first < int(KERNELS) / 4
    assert sum(others) > int(KERNELS) and last > 0


TRAINING = """
import os, sys, numpy, soundfile, tempfile
from modeling_encodec import CodecTrainer, TrainingConfig
os.chdir(tempfile.mkdtemp()); os.mkdir("audio")
soundfile.write("audio/a.wav", 0.1 * numpy.random.default_rng(0).standard_normal(24000), 24000)
trainer = CodecTrainer(TrainingConfig(
    architecture="c16", corpora=[{"name": "a", "source": "audio"}], epochs=1, updates_per_epoch=3, batch_size=2,
    workers=0, segment_seconds=0.2, trackers=[], device="cpu", discriminator_filters=8, discriminator_chance=1.0,
))
one_update = trainer.one_update

def told(batch):
    print("of", trainer.update, flush=True)
    return one_update(batch)

trainer.one_update = told
trainer.train()
"""


def test_training_compiles_nothing_twice():
    _, _, last = misses(run(TRAINING, ONEDNN_VERBOSE="profile_create", ACCELERATE_USE_CPU="true"))
    assert last == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc as on Linux")
def test_memory_of_many_lengths():
    """With the limit much less grows than without: two thirds, with a model this small."""
    script = (
        MODEL
        + """
def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6
encode(40000)
before = memory()
for samples in range(12000, 12000 + 40 * 600, 40):
    encode(samples)
print("of", memory() - before)
"""
    )
    grown = [float(run(script, **{SETTINGS[0]: kept}).split("of ")[-1]) for kept in (KERNELS, "100000")]
    assert grown[0] < 0.85 * grown[1], grown
