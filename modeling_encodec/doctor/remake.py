"""`python -m modeling_encodec.doctor.remake`: the stored results anew, with one thread of a CPU, and step times there.

For maintainers, and only where the bundled checkpoints are other ones.
"""

from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling_encodec.doctor.checks import step_times
from modeling_encodec.doctor.environment import cpu_name
from modeling_encodec.doctor.golden import PATH, Golden, digests, fingerprints, load_models, previous_frames
from modeling_encodec.processors.audio import read_audio
from modeling_encodec.system.atomic import atomic_path


# Of speech and music: from which second, and how many; different ones, so that accelerators compute rows of different
# lengths together.
SECONDS = {"speech": (1.0, 1.2), "music": (2.0, 0.5)}


@torch.no_grad()
def make_golden() -> Golden:
    """What the bundled models give here."""
    model, lm = load_models()
    rate, folder = model.config.sampling_rate, Path(__file__).parents[1] / "demo" / "audio"
    rows = []
    for name, (start, seconds) in SECONDS.items():
        audio = torch.from_numpy(read_audio(folder / f"{name}.flac", rate, 1)[0])
        rows.append(
            audio[:, int(start * rate) : int((start + seconds) * rate)].mul(32768).round().clamp(-32768, 32767)
        )
    lengths = torch.tensor([row.shape[1] for row in rows], dtype=torch.int64, device="cpu")
    audio = torch.stack([torch.nn.functional.pad(row, (0, int(lengths.max()) - row.shape[1])) for row in rows]) / 32768
    mask = torch.arange(audio.shape[2], device="cpu") < lengths[:, None]
    coded = model.encode(audio, mask, num_quantizers=model.config.num_quantizers, return_latents=True)
    decoded = model.decode(**coded).audio_values
    counts, _ = lm.frequencies(previous_frames(coded.audio_codes[0]))
    about = {"torch": torch.__version__, "machine": cpu_name(), **fingerprints(model, lm)}
    return Golden(audio, lengths, coded.audio_codes[0], coded.latents[0], decoded, digests(counts), about)


def save_golden(golden: Golden, path: Path = PATH) -> None:
    """Write it."""
    tensors = {field.name: getattr(golden, field.name) for field in fields(golden) if field.name != "about"}
    tensors["audio"] = (32768 * golden.audio).to(torch.int16)
    tensors["codes"] = golden.codes.to(torch.int16)
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, golden.about)


def main() -> None:
    """Make the file anew, with step times of this machine."""
    torch.set_num_threads(1)
    golden, (model, lm) = make_golden(), load_models()
    times = {}
    for precision in ("exact", "fast"):
        model.precision = precision
        times |= {f"{name}, {precision}": f"{took:.2f}" for name, took in step_times(model, lm, golden).items()}
    golden.about.update(times)
    save_golden(golden)
    print(f"{PATH}: {PATH.stat().st_size} bytes, {golden.about}")


if __name__ == "__main__":
    main()
