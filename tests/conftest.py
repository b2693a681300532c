"""Models and audio that many tests share."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from ecdc_files import make_lm
from peers import fill_codebooks, level_output

from modeling_encodec.bitstream.compression import compress
from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.cli import main
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


torch.set_num_threads(1)  # pytest-xdist runs one process per core

SHARED = Path(__file__).parents[2] / "shared"


def make_model(config: EncodecConfig, seed: int = 0) -> EncodecModel:
    """A model with random weights and codebooks that fit what its encoder puts out."""
    torch.manual_seed(seed)
    model = EncodecModel(config).eval()
    fill_codebooks(model)
    level_output(model)
    return model


@pytest.fixture(scope="session")
def released_models() -> dict[str, EncodecModel]:
    """The three released architectures at full size, by name."""
    presets = {"24khz": EncodecConfig.preset_24khz, "48khz": EncodecConfig.preset_48khz}
    return {name: make_model(preset()) for name, preset in (presets | {"32khz": EncodecConfig.preset_32khz}).items()}


@pytest.fixture(scope="session")
def small_models() -> dict[str, EncodecModel]:
    """The three architectures with 4 filters and a 16-wide latent, for tests that run them often."""
    size = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}
    return {
        "24khz": make_model(EncodecConfig.preset_24khz(**size, target_bandwidths=[0.9, 1.8, 3.6])),
        "48khz": make_model(EncodecConfig.preset_48khz(**size, target_bandwidths=[1.8, 3.6])),
        "32khz": make_model(EncodecConfig.preset_32khz(**size, target_bandwidths=[1.2])),
    }


@pytest.fixture(scope="session")
def bundled_model() -> EncodecModel:
    return EncodecModel.from_pretrained(bundled_checkpoint()).eval()


@pytest.fixture
def device():
    """A GPU: the machine's, or where there is none the pretended one of tests/gpu."""
    from devices import gpu_or_pretended

    with gpu_or_pretended() as found:
        yield found


@pytest.fixture
def second_device(device):
    """The same, with a "cuda:1"."""
    if device.count < 2:
        pytest.skip("one GPU")
    return device


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, stdout and the lines of stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return call


@pytest.fixture(scope="session")
def real_clip():
    """`real_clip(rate)`: the real test clip at 24000 (mono) or 48000 Hz (stereo), float32 (1, channels, T)."""

    def load(rate: int) -> torch.Tensor:
        path = SHARED / "audio" / f"test_{rate // 1000}k.flac"
        if not path.exists():
            pytest.skip(f"{path.name} is not at hand")
        samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(np.ascontiguousarray(samples.T))[None]

    return load


def noise(batch: int, channels: int, samples: int, seed: int = 0) -> torch.Tensor:
    """Noise of changing loudness, (batch, channels, samples)."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(batch, 1, samples // 4000 + 1, generator=generator).repeat_interleave(4000, 2)[..., :samples]
    return 0.3 * loudness * torch.randn(batch, channels, samples, generator=generator)


def clip(model: EncodecModel, seconds: float, seed: int = 1) -> torch.Tensor:
    """Noise, then a buzz of a few sines: what fits one does not fit the other."""
    config = model.config
    samples = max(2, int(seconds * config.sampling_rate))
    audio = noise(1, config.audio_channels, samples, seed=seed)[0]
    time = torch.arange(samples) / config.sampling_rate
    audio[:, samples // 2 :] = 0.5 * torch.sin(2 * torch.pi * 300 * time[samples // 2 :])
    return audio


@pytest.fixture(scope="session")
def lms(small_models) -> dict[str, EncodecLM]:
    """Language models that make the second half of `clip` shorter and its first half longer."""
    made = {}
    for name, model in small_models.items():
        audio = clip(model, 6.0)
        made[name] = make_lm(model, audio[:, audio.shape[1] // 2 :])
    return made


@pytest.fixture(scope="session")
def file_24khz(small_models, lms) -> bytes:
    """8 segments of 0.25 s at 24 kHz, some raw and some not, the last one shorter."""
    return compress(small_models["24khz"], clip(small_models["24khz"], 1.9), 3.6, lms["24khz"], segment_seconds=0.25)


@pytest.fixture(scope="session")
def file_48khz(small_models, lms) -> bytes:
    """3 segments of one chunk."""
    return compress(small_models["48khz"], clip(small_models["48khz"], 2.5), 3.6, lms["48khz"], segment_seconds=0.1)
