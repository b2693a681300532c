"""Where a model runs: what may be asked for, and what there is."""

import torch


def find_device(name: str, number: int = 0) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:1, mps ... "cuda" is that of process `number` of this machine, where
    processes share its GPUs by turns.

    Raises:
        ValueError: if there is none of that name here, or this process cannot use it.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.device_count():
            device = torch.device("cuda", number % torch.cuda.device_count())
        if device.type == "meta":  # which computes nothing
            raise RuntimeError("meta")
        torch.empty(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        if "forked subprocess" in str(error):
            raise ValueError(
                f"device is {name!r} in a process forked after CUDA was used, allowed: cpu, or spawned processes: "
                'multiprocess.set_start_method("spawn") before datasets maps with num_proc'
            ) from None
        raise ValueError(f"device is {name!r}, allowed here: {', '.join(devices_here())}") from None
    return device


def move(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model there.

    Raises:
        ValueError: if it does not fit.
    """
    try:
        return model.to(device)
    except RuntimeError as error:
        raise ValueError(f"device is '{device}': {' '.join(str(error).split())}") from None


def devices_here() -> list[str]:
    """The names of all devices that can compute."""
    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names + [f"xpu:{number}" for number in range(torch.xpu.device_count())]
