"""Training on a machine that has PyTorch, no network and not all packages, rehearsed on this one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (HERE.parents[1] / ".git").exists() or shutil.which("ffmpeg") is None, reason="needs the repository and ffmpeg"
)


def rehearse(**more: str) -> str:
    environment = os.environ | {"PYTHON": sys.executable} | more
    done = subprocess.run(["sh", HERE / "rehearse.sh"], env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_travels_is_small_enough():
    assert "what travels: " in rehearse(ONLY_SIZE="1")


@pytest.mark.slow
def test_training_from_what_travels():
    assert "rehearsed: two updates on two machines, " in rehearse()
