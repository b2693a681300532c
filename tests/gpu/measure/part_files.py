"""The language model's whole numbers on the CPU and on the card, and files coded with them, both ways, bit for bit."""

import copy
import importlib.util
import io

import torch
from models import bundled, real_clips


def measure(bench) -> None:
    """Frequencies; then files, where the range coder is installed."""
    model, lm = bundled()
    places = {"CPU": (model, lm), "card": tuple(copy.deepcopy(one).to(bench.device) for one in (model, lm))}
    clip = max(real_clips(24000, 1).values(), key=lambda clip: clip.shape[1])
    clip = clip[:, : 24000 * (1 if bench.rehearse else 12)]
    with torch.no_grad():
        codes = model.encode(clip[None], num_quantizers=8).audio_codes[0]
    bench.try_note("frequencies", lambda: _frequencies(codes, lm, places["card"][1]))
    if importlib.util.find_spec("constriction") is None:
        bench.note("files", "not run: constriction is not installed")
        return
    for maker, reader in (("CPU", "card"), ("card", "CPU")):
        label = f"file of the {maker}, read by the {reader}"
        bench.try_note(label, lambda maker=maker, reader=reader: _file(clip, places[maker], places[reader]))


def _frequencies(codes: torch.Tensor, ours, theirs) -> str:
    mine, other = ours.frequencies(codes)[0], theirs.frequencies(codes.to(theirs.device))[0].cpu()
    equal = int((mine == other).all(-1).sum())
    return f"of {codes.numel()} codes {'all' if equal == codes.numel() else f'only {equal}'} equal to the bit"


def _file(clip: torch.Tensor, maker: tuple, reader: tuple) -> str:
    """Whether the reader reads the codes that the maker reads."""
    from modeling_encodec import compress, read_codes

    data = compress(maker[0], clip, 6.0, maker[1])
    mine, other = (read_codes(io.BytesIO(data), *models, strict=True) for models in (maker, reader))
    return f"{len(data)} bytes, codes {'equal to the bit' if (mine == other).all() else 'NOT EQUAL'}"
