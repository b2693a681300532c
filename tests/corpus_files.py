"""Corpora as users have them: good clips of many kinds beside files that give no audio."""

from pathlib import Path

import numpy as np
import soundfile


# name: (Hz, channels, samples)
GOOD = {
    "a/mono.wav": (24000, 1, 24000),
    "a/short.flac": (24000, 1, 1),
    "b/telephone.wav": (8000, 1, 6000),
    "b/studio.flac": (96000, 2, 70000),
    "b/cd.ogg": (44100, 2, 40000),
    "deep/er/mono.wav": (24000, 1, 33333),
    "z.wav": (22050, 1, 3),
}
# name: what the reason says
BAD = {
    "a/empty.wav": "not readable as audio",
    "a/noaudio.wav": "holds no audio",
    "b/cut.flac": "not readable as audio",
    "b/cut.wav": "cut off: ",
    "b/cut.mp3": "cut off: ",
    "b/nan.wav": "NaN or infinite",
    "text.mp3": "not readable as audio",
}


def sound(rate: int, channels: int, samples: int, seed: int = 0) -> np.ndarray:
    """A tone in noise, (samples, channels)."""
    rng = np.random.default_rng(seed)
    tone = 0.3 * np.sin(2 * np.pi * 200 * (1 + seed % 7) * np.arange(samples)[:, None] / rate)
    return (tone + 0.05 * rng.standard_normal((samples, channels))).astype(np.float32)


def write_corpus(folder: Path, *, bad: bool = True, long_seconds: float = 0) -> Path:
    """A folder with all of `GOOD`, and of `BAD`; and one clip of so many seconds."""
    for seed, (name, (rate, channels, samples)) in enumerate(GOOD.items()):
        _write(folder / name, sound(rate, channels, samples, seed), rate)
    if long_seconds:
        _write(folder / "long.flac", sound(24000, 1, int(24000 * long_seconds), 5), 24000)
    if bad:
        _write(folder / "a/noaudio.wav", np.zeros((0, 1), np.float32), 24000)
        _write(folder / "b/cut.flac", sound(24000, 1, 90000), 24000)
        whole = (folder / "b/cut.flac").read_bytes()
        (folder / "b/cut.flac").write_bytes(whole[: len(whole) // 3])
        for name in ("b/cut.wav", "b/cut.mp3"):
            _write(folder / name, sound(24000, 1, 90000), 24000)
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[: len(whole) // 2])
        samples = sound(24000, 1, 3000)
        samples[2000] = np.nan
        soundfile.write(folder / "b/nan.wav", samples, 24000, subtype="FLOAT")
        (folder / "a/empty.wav").write_bytes(b"")
        (folder / "text.mp3").write_text("this is no music\n" * 50)
    return folder


def _write(path: Path, samples: np.ndarray, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
