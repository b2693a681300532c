"""An update of the codec: the bundled size and the standard one, float32 and bfloat16, beside a plain loop over the
`encodec` package's modules where that is installed."""

import importlib.util
import sys
import types
from pathlib import Path

import torch
from models import codec


# By which of the card's matrix rates a side is judged: PyTorch's convolutions are TF32 unless told otherwise.
RATES = {"fp32": "tf32", "bf16": "bf16"}


def measure(bench) -> None:
    """Updates in which the discriminator learns, and others."""
    if importlib.util.find_spec("accelerate") is None:
        bench.note("updates", "not run: accelerate is not installed")
        return
    bench.measure_limits()
    for recipe, batch in (("c16_debian", 64), ("paper_24khz", 64), ("paper_48khz", 16)):
        sides = {}
        for kind in ("fp32", "bf16"):
            try:
                sides[kind] = _side(bench, recipe, 2 if bench.rehearse else batch, kind)
            except Exception as error:
                bench.note(f"{recipe}, {kind}", f"FAILED: {type(error).__name__}: {error}")
        if recipe == "paper_24khz":
            try:
                sides["plain loop over encodec, fp32"] = _plain_side(bench, 1 if bench.rehearse else batch)
            except Exception as error:
                bench.note(f"{recipe}, plain loop", f"not run: {type(error).__name__}: {error}")
        for learns in (True, False):
            label = f"{recipe}, {batch} x 1 s, {'discriminator learns' if learns else 'does not'}"
            calls = {name: lambda run=run, learns=learns: run(learns) for name, run in sides.items()}
            bench.compare(label, calls, seconds=batch, kinds=RATES, count=True)
        sides.clear()
        bench.free()


def _numbers(config, bandwidths):
    """Of updates at the highest bandwidth, so that one discriminator and all codebooks have work: learning -> them."""
    from modeling_encodec.training.codec_update import choices_of

    found = {True: [], False: []}
    for number in range(400):
        choices = choices_of(config, bandwidths, number)
        if choices.bandwidth == max(bandwidths):
            found[choices.discriminator_learns].append(number)
    return found


def _side(bench, recipe: str, batch: int, kind: str):
    from modeling_encodec.training.codec_update import CodecUpdate
    from modeling_encodec.training.configuration import load_config

    changes = {"discriminator_filters": 2, "kmeans_iterations": 1} if bench.rehearse else {}
    config = load_config(recipe, batch_size=batch, accumulation_steps=1, **changes)
    model = codec("48khz" if "48" in recipe else "24khz", bench.rehearse)
    if recipe.startswith("c16") and not bench.rehearse:
        from models import bundled

        model = bundled()[0]
    device = torch.device(bench.device)
    accelerator = types.SimpleNamespace(
        device=device,
        num_processes=1,
        process_index=0,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"),
    )
    update = CodecUpdate(model.to(device).train(), config, accelerator)
    samples = model.config.sampling_rate // (4 if bench.rehearse else 1)
    audio = 0.1 * torch.randn(batch, model.config.audio_channels, samples, device=device)
    numbers, done = _numbers(config, update.bandwidths), [0]

    def run(learns: bool):
        done[0] += 1
        update.run(audio, numbers[learns][done[0] % len(numbers[learns])])

    return run


def _plain_side(bench, batch: int):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from bench_training import MultiScaleSTFTDiscriminator, plain_side

    from modeling_encodec.training.configuration import TrainingConfig

    model = codec("24khz", False)
    judges = {bandwidth: MultiScaleSTFTDiscriminator() for bandwidth in model.config.target_bandwidths}
    side = plain_side(types.SimpleNamespace(device=bench.device, batch=batch), model, judges)
    audio = 0.1 * torch.randn(batch, 1, 6000 if bench.rehearse else 24000, device=bench.device)
    numbers, done = _numbers(TrainingConfig(), model.config.target_bandwidths), [0]

    def run(learns: bool):
        done[0] += 1
        side.update.run(audio, numbers[learns][done[0] % len(numbers[learns])])

    return run
