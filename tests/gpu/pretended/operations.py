"""What is known of PyTorch's operations on a CUDA device: launches, where the host waits, and what they refuse."""

import functools

import torch


COPIES = {"copy_", "_to_copy", "copy"}
# Take a CPU tensor of any size as an index, which is then copied to the device.
INDEXED = {"index.Tensor", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index.Tensor", "_unsafe_index_put"}
# Of these no CPU tensor may be an argument, not even a number in a tensor of no dimension.
UNMIXED = {
    "mm", "bmm", "addmm", "mv", "baddbmm", "cat", "stack", "gather", "index_select", "embedding", "_embedding_bag",
    "index_add_", "index_add", "index_copy_", "index_copy", "scatter_", "scatter_add_", "convolution", "searchsorted",
    "bucketize", "_weight_norm_interface", "native_group_norm", "native_layer_norm", "reflection_pad1d",
}  # fmt: skip
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "convolution", "convolution_backward"}
NO_INTEGERS = {"mm", "bmm", "addmm", "mv", "baddbmm", "convolution"}
# The size of the result, or the result itself, is asked of the device.
WAITS = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "bincount",
    "histc", "equal", "_local_scalar_dense", "linalg_solve_ex", "linalg_inv_ex", "_linalg_check_errors",
}  # fmt: skip
NO_LAUNCH = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_local_scalar_dense", "detach", "alias",
    "_unsafe_view", "lift_fresh", "is_same_size", "_fused_sdp_choice", "set_", "is_pinned", "_pin_memory",
    "pin_memory",
}  # fmt: skip
# Kernels of one call, where they are not one.
LAUNCHES = {
    "native_group_norm": 3, "native_group_norm_backward": 4, "native_layer_norm_backward": 2, "sort": 4, "argsort": 4,
    "_fft_r2c": 2, "_fft_c2r": 3, "_embedding_bag": 2, "embedding_dense_backward": 3, "bincount": 6, "index_put_": 2,
    "_index_put_impl_": 2, "reflection_pad1d_backward": 2, "nonzero": 2, "masked_select": 3,
}  # fmt: skip
FUSED = 60  # tensors that one kernel of a `_foreach` operation takes


@functools.cache
def name_of(func) -> str:
    """Such as `index.Tensor` or `mm`."""
    name, overload = func._schema.name.split("::")[1], func._schema.overload_name
    return f"{name}.{overload}" if overload else name


def base(name: str) -> str:
    """The name without its overload."""
    return name.split(".")[0]


def tensors_in(*values) -> list[torch.Tensor]:
    """All tensors in what is nested."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict) and value:
            found += tensors_in(*value.values())
    return found


def changed(function, value):
    """What is nested, with `function` of each tensor in it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([changed(function, item) for item in value]) if value else value
    if isinstance(value, dict):
        return {key: changed(function, item) for key, item in value.items()}
    return value


@functools.cache
def is_view(func) -> bool:
    """Whether what it returns is memory of an argument."""
    infos = [result.alias_info for result in func._schema.returns]
    return not func._schema.is_mutable and any(info is not None and not info.is_write for info in infos)


def written_arguments(func, args: tuple, kwargs: dict) -> list:
    """The arguments that an operation writes to, in their order."""
    return [args[place] if place < len(args) else kwargs.get(name) for place, name in _written_places(func)]


@functools.cache
def _written_places(func) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def launches_of(func, args: tuple, kwargs: dict) -> int:
    """Kernels that one call starts."""
    name = base(name_of(func))
    if name in NO_LAUNCH or is_view(func):
        return 0
    if name == "convolution":
        return 1 + (args[2] is not None)  # the bias is a kernel of its own
    if name == "convolution_backward":
        return sum(kwargs.get("output_mask", args[-1]))
    if name == "constant_pad_nd":
        return 2 if any(args[1]) else 1
    if name.startswith("_foreach"):
        most = max((len(value) for value in args if isinstance(value, (list, tuple))), default=1)
        return -(-most // FUSED)
    return LAUNCHES.get(name, 1)


def bytes_moved(func, args: tuple, kwargs: dict, out) -> int:
    """Bytes that one call reads and writes, each tensor once."""
    if base(name_of(func)) in NO_LAUNCH or is_view(func):
        return 0
    copies = base(name_of(func)) == "copy_"
    moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors_in(args, kwargs))
    if not func._schema.is_mutable and not copies:
        moved += sum(t.numel() * t.element_size() for t in tensors_in(out))
    return moved


def in_tf32(func, args: tuple) -> tuple:
    """The arguments of a product as tensor cores take them where the process allows TF32: with 10 bits of mantissa."""
    name = base(name_of(func))
    if name not in PRODUCTS:
        return args
    place = torch.backends.cudnn.conv if name.startswith("convolution") else torch.backends.cuda.matmul
    return changed(_rounded_to_tf32, args) if place.fp32_precision == "tf32" else args


def _rounded_to_tf32(t: torch.Tensor) -> torch.Tensor:
    if t.dtype != torch.float32 or t.device.type == "meta":
        return t
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def mask_indices(func, args: tuple) -> list[torch.Tensor]:
    """Boolean tensors used as an index, whose ones must be counted before anything is computed."""
    if name_of(func) not in INDEXED or len(args) < 2 or _is_fill(func, args):
        return []
    return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]


def _is_fill(func, args: tuple) -> bool:
    """`x[mask] = number`, which is filled in without counting."""
    if base(name_of(func)) not in ("index_put_", "_index_put_impl_") or len(args) < 3:
        return False
    value, accumulate = args[2], len(args) > 3 and args[3]
    masks = [index for index in args[1] if index is not None]
    return value.dim() == 0 and value.device.type == "cpu" and not accumulate and len(masks) == 1


def refusal(func, args: tuple, kwargs: dict, is_ours) -> str | None:
    """Why CUDA would not do this: `is_ours` says which tensors are on a device; None if it would."""
    name, given = name_of(func), tensors_in(args, kwargs)
    ours, others = [t for t in given if is_ours(t)], [t for t in given if not is_ours(t)]
    wanted, generator = kwargs.get("device"), kwargs.get("generator")
    target = "cuda" if wanted is None else torch.device(wanted).type
    if generator is not None and generator.device.type != target:
        return f"{name}: Expected a '{target}' device type for generator but found '{generator.device.type}'"
    if base(name) in COPIES:
        return None
    devices = sorted({str(t.device) for t in ours})
    if len(devices) > 1:
        return f"{name}: Expected all tensors to be on the same device, found {' and '.join(devices)}"
    if ours and others and name not in INDEXED:
        numbers = all(t.dim() == 0 for t in others) and base(name) not in UNMIXED
        written = tensors_in(written_arguments(func, args, kwargs))
        if not numbers or any(not is_ours(t) for t in written):
            shapes = ", ".join(str(tuple(t.shape)) for t in others)
            return (
                f"{name}: Expected all tensors to be on the same device, found {devices[0]} and cpu of shape {shapes}"
            )
    if ours and base(name) in NO_INTEGERS and not ours[0].dtype.is_floating_point:
        return f"{name}: not implemented for {ours[0].dtype} on CUDA"
    return None
