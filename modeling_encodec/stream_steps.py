"""What a stream remembers, as one value, and how rows that stand at the same place in it go on."""

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from modeling_encodec.atomic import atomic_path
from modeling_encodec.chunks_encodec import overlap_triangle
from modeling_encodec.configuration_encodec import EncodecConfig
from modeling_encodec.modeling_encodec import EncodecModel


@dataclass(frozen=True)
class StreamState:
    """All that a stream of B rows remembers. A value: each push makes a new one, and none is ever written to.

    Args:
        waiting (torch.Tensor of shape (B, C, W)): samples or latents that nothing could be made of yet; of a
            decoder with chunks, audio that the next chunk overlaps.
        counts (torch.LongTensor of shape (B,)): how many of them there are, on the CPU.
        started (torch.BoolTensor of shape (B,)): whether the row's beginning is behind it, on the CPU.
        layers (tuple of torch.Tensor, each (B, ...)): what the layers keep; of a decoder with chunks, the weight
            of each waiting sample, and the first and last chunk's frames.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecModel, StreamState, StreamingEncoder, bundled_checkpoint
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> encoder = StreamingEncoder(model, bandwidth=3.0)
        >>> _ = encoder.push(0.1 * torch.randn(1, 1, 5000))
        >>> before, samples = encoder.state, 0.1 * torch.randn(1, 1, 640)
        >>> codes = encoder.push(samples)
        >>> encoder.state = before  # and the same again
        >>> torch.equal(encoder.push(samples), codes)
        True
        >>> before.save("stream.safetensors")
        >>> after, _ = StreamState.load("stream.safetensors")
        >>> torch.equal(after.waiting, before.waiting)
        True
    """

    waiting: torch.Tensor
    counts: torch.Tensor
    started: torch.Tensor
    layers: tuple[torch.Tensor, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "layers"}
        return named | {f"layers.{index}": tensor for index, tensor in enumerate(self.layers)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "StreamState":
        """The state of which these `tensors` are the `tensors()`."""
        layers = tuple(tensors[f"layers.{index}"] for index in range(len(tensors) - 3))
        return cls(tensors["waiting"], tensors["counts"], tensors["started"], layers)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "StreamState":
        """The state with every tensor changed by `change`."""
        return self.from_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def rows(self, rows: list[int]) -> "StreamState":
        """The state of these `rows` alone."""
        return self if rows == list(range(len(self.counts))) else self.map(lambda tensor: tensor[rows])

    def with_rows(self, rows: list[int], other: "StreamState") -> "StreamState":
        """The state with these `rows` taken from `other`, which has them alone."""
        if rows == list(range(len(self.counts))):
            return other
        ours, theirs = self.tensors(), other.tensors()
        devices = {tensor.device for tensor in ours.values()}
        index = {device: torch.tensor(rows, dtype=torch.int64, device=device) for device in devices}
        return self.from_tensors(
            {name: ours[name].index_copy(0, index[ours[name].device], theirs[name]) for name in ours}
        )

    def save(self, path: str | Path, about: dict | None = None) -> None:
        """Write a safetensors file at `path`, with the facts `about` the stream that it belongs to."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"stream": json.dumps(about or {})})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> tuple["StreamState", dict]:
        """The state, on this `device`, and the facts that `save` wrote at `path`.

        Raises:
            ValueError: if the file is no stream's state.
            FileNotFoundError: if there is no such file.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {})["stream"])
                state = cls.from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no saved state of a stream ({error})") from None
        return replace(state, counts=state.counts.cpu(), started=state.started.cpu()), about


class LayerSteps:
    """Layers that remember: the encoder or the decoder of a model that codes the whole signal."""

    def __init__(
        self,
        model: EncodecModel,
        net: torch.nn.Module,
        mode: str,
        *,
        prepare=None,
        finish=None,
        graphs: bool = False,
        onnx_hop=None,
    ):
        """`prepare` makes the network's inputs of what is pushed, `finish` what is given out of its outputs and the
        sizes of their blocks; `onnx_hop` does it all for one hop."""
        net.check_pieces()
        self.model, self.net, self.prepare, self.finish, self.onnx_hop = model, net, prepare, finish, onnx_hop
        self.graphs = {} if graphs else None
        self.begun = mode == "low_latency"  # silence before the signal is a state as any
        channels = model.config.audio_channels, model.config.hidden_size
        self.channels, self.channels_out = channels if net is model.encoder else reversed(channels)

    def beginning(self, rows: int) -> StreamState:
        """The state of rows that nothing was pushed to."""
        width = max(self.net.hop, 0 if self.begun else self.net.start) - 1
        return StreamState(
            torch.zeros(rows, self.channels, width, dtype=torch.float32, device=self.model.device),
            torch.zeros(rows, dtype=torch.int64, device="cpu"),
            torch.full((rows,), self.begun, dtype=torch.bool, device="cpu"),
            self.net.quiet_state(rows, self.model.compute_dtype),
        )

    def place(self, state: StreamState, row: int) -> tuple:
        """Where a row stands: rows at one place can be computed together."""
        return bool(state.started[row]), int(state.counts[row])

    def advance(self, state: StreamState, inputs: tuple, end: bool) -> tuple[tuple, StreamState]:
        """The next inputs of rows that stand at one place -> what can be made of them and those that waited."""
        started, waits, hop = bool(state.started[0]), int(state.counts[0]), self.net.hop
        one_hop = started and not end and waits == 0 and inputs[0].shape[2] == hop
        if one_hop and self.onnx_hop is not None and self.onnx_hop.fits(inputs[0]):
            given, layers = self.onnx_hop(inputs[0], state.layers)
            return (given,), replace(state, layers=layers)
        x = self.prepare(inputs[0]) if self.prepare else inputs[0]
        x = torch.cat([state.waiting[..., :waits], x], dim=2)
        total = x.shape[2]
        least = 0 if started else self.net.start
        used = total if end else least + (total - least) // hop * hop if total >= least else 0
        given, layers, sizes = x.new_zeros(len(x), self.channels_out, 0), state.layers, [0]
        if used or (end and started):
            one_hop = started and not end and used == hop
            run = self._run_graph if one_hop and self.graphs is not None else self.net.step
            taken = x[..., :used]
            given, layers = run(taken, layers if started else None, end, dtype=self.model.compute_dtype)
            sizes = self.net.block_outputs(taken, started, given.shape[2]) if self.finish else None
        given = self.finish(given, blocks=sizes) if self.finish else given.to(self.model.dtype)
        if end:
            return (given,), self.beginning(len(x))
        waiting = F.pad(x[..., used:], (0, state.waiting.shape[2] - (total - used)))
        counts, begun = torch.full_like(state.counts, total - used), state.started | (used > 0)
        return (given,), StreamState(waiting, counts, begun, layers)

    def _run_graph(self, x: torch.Tensor, state: tuple, end: bool, dtype: torch.dtype) -> tuple[torch.Tensor, tuple]:
        """One hop of as many rows, by a CUDA graph that is recorded at the first."""
        if len(x) not in self.graphs:
            self.graphs[len(x)] = _GraphedHop(self.net, x, state, dtype)
        return self.graphs[len(x)](x, state)


class _GraphedHop:
    """`net.step` on one hop as a CUDA graph: some 100 small kernels by one call, with the weights of its making."""

    def __init__(self, net: torch.nn.Module, x: torch.Tensor, state: tuple, dtype: torch.dtype):
        self.inputs = [x.clone(), *(part.clone() for part in state)]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries must have chosen their kernels before anything is recorded
            for _ in range(3):
                net.step(self.inputs[0], self.inputs[1:], end=False, dtype=dtype)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output, self.after = net.step(self.inputs[0], self.inputs[1:], end=False, dtype=dtype)
        # What the graph reads must not be freed when weights are folded anew.
        self.folded = [module.cache.values() for module in net.modules() if hasattr(module, "cache")]

    def __call__(self, x: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        for place, value in zip(self.inputs, (x, *state)):
            place.copy_(value)
        self.graph.replay()
        return self.output.clone(), tuple(part.clone() for part in self.after)


class ChunkEncoding:
    """Chunks, each coded when it is full."""

    def __init__(self, model: EncodecModel, num_quantizers: int):
        self.model, self.num_quantizers = model, num_quantizers

    def beginning(self, rows: int) -> StreamState:
        """The state of rows that nothing was pushed to."""
        config = self.model.config
        shape = rows, config.audio_channels, config.chunk_length - 1
        return StreamState(
            torch.zeros(shape, dtype=torch.float32, device=self.model.device),
            torch.zeros(rows, dtype=torch.int64, device="cpu"),
            torch.zeros(rows, dtype=torch.bool, device="cpu"),
            (),
        )

    def place(self, state: StreamState, row: int) -> int:
        """Where a row stands: rows at one place can be computed together."""
        return int(state.counts[row])

    def advance(self, state: StreamState, inputs: tuple, end: bool) -> tuple[tuple, StreamState]:
        """The next samples of rows that stand at one place -> codes and scales of the chunks that are full."""
        config = self.model.config
        x = torch.cat([state.waiting[..., : int(state.counts[0])], inputs[0]], dim=2)
        spans = [span for span in config.chunk_spans(x.shape[2]) if end or span[1] - span[0] == config.chunk_length]
        pieces = [x[row : row + 1, :, slice(*span)] for row in range(len(x)) for span in spans]
        coded, scales = self.model.encode_pieces(pieces, self.num_quantizers)
        nothing = torch.zeros(len(x), self.num_quantizers, 0, dtype=torch.int64, device=x.device)
        codes = torch.cat([nothing, *(torch.cat(coded[at :: len(spans)]) for at in range(len(spans)))], dim=2)
        scales = torch.cat(scales).view(len(x), -1) if scales else x.new_ones(len(x), len(spans))
        if end:
            return (codes, scales), self.beginning(len(x))
        x = x[..., len(spans) * config.chunk_stride :]
        waiting = F.pad(x, (0, config.chunk_length - 1 - x.shape[2]))
        counts = torch.full_like(state.counts, x.shape[2])
        return (codes, scales), StreamState(waiting, counts, state.started | bool(spans), ())


class ChunkDecoding:
    """Chunks, each added to what the ones before it left where they overlap."""

    def __init__(self, model: EncodecModel):
        config = model.config
        self.model, self.full = model, config.num_frames(config.chunk_length)
        self.hop, self.stride = config.hop_length, config.chunk_stride

    def beginning(self, rows: int) -> StreamState:
        """The state of rows that nothing was pushed to."""
        config, device = self.model.config, self.model.device
        width = self.full * config.hop_length
        weight = torch.zeros(rows, 1, width, dtype=torch.float32, device=device)
        return StreamState(
            torch.zeros(rows, config.audio_channels, width, dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.int64, device="cpu"),
            torch.zeros(rows, dtype=torch.bool, device="cpu"),
            (weight, torch.zeros(rows, 2, dtype=torch.int64, device=device)),
        )

    def place(self, state: StreamState, row: int) -> tuple:
        """Where a row stands: rows at one place can be computed together."""
        return int(state.counts[row]), *state.layers[1][row].tolist()

    def advance(self, state: StreamState, inputs: tuple, end: bool) -> tuple[tuple, StreamState]:
        """The next whole chunks of rows that stand at one place -> the audio that no later chunk overlaps."""
        codes, scales = inputs
        chunks = split_chunks(self.model.config, scales.shape[1], codes.shape[2])
        pieces = [codes[row : row + 1, :, start : start + n] for row in range(len(codes)) for start, n in chunks]
        decoded = self.model.decode_pieces(pieces, scales.reshape(-1) if self.model.config.normalize else None)
        # All chunks are faded by the first one's triangle; only a signal that ends soon has a shorter one.
        first, last = state.layers[1][0].tolist()
        if chunks:
            self._check_order(last, chunks[0][1])
            first, last = first or chunks[0][1], chunks[-1][1]
        triangle = overlap_triangle(first * self.hop, codes.device)
        waiting, weight, length = state.waiting.clone(), state.layers[0].clone(), int(state.counts[0])
        outputs = [waiting[..., :0]]

        def give(count: int) -> None:
            nonlocal waiting, weight
            outputs.append(waiting[..., :count] / weight[..., :count])
            waiting, weight = (F.pad(part[..., count:], (0, count)) for part in (waiting, weight))

        for number in range(len(chunks)):
            chunk = torch.cat(decoded[number :: len(chunks)]).float()
            part = triangle[: chunk.shape[2]]
            waiting[..., : len(part)] += part * chunk
            weight[..., : len(part)] += part
            length = max(length, len(part))
            if length >= self.stride:  # where the next chunk begins, if there is one
                give(self.stride)
                length -= self.stride
        if end:
            give(length)
        audio = torch.cat(outputs, dim=2).to(self.model.dtype)
        if end:
            return (audio,), self.beginning(len(waiting))
        counts = torch.full_like(state.counts, length)
        layers = weight, torch.tensor([[first, last]], dtype=torch.int64, device=weight.device).expand(len(weight), 2)
        return (audio,), StreamState(waiting, counts, state.started | bool(chunks), layers)

    def _check_order(self, last: int, next_one: int) -> None:
        """A chunk that is cut is followed, where another overlaps it, by one that the same end cuts."""
        if not 0 < last < self.full:
            return
        ends = ((last - 1) * self.hop + 1, last * self.hop)
        allowed = sorted({self.model.config.num_frames(end - self.stride) for end in ends if end > self.stride})
        if next_one not in allowed:
            given = f"a chunk of {next_one} frames follows one of {last}"
            raise ValueError(f"{given}, allowed: {' or '.join(map(str, allowed)) or 'none, for that was the last'}")


def split_chunks(config: EncodecConfig, chunks: int, frames: int) -> list[tuple[int, int]]:
    """(start, frames) of each of so many chunks, of so many frames together: full ones, unless they are a signal's
    last, whose end cuts the last and those that overlap it.

    Raises:
        ValueError: if so many chunks do not have so many frames.
    """

    def cut(rest: int) -> list[int]:
        starts = range(0, chunks * config.chunk_stride, config.chunk_stride)
        return [config.num_frames(min(config.chunk_length, rest - start)) for start in starts]

    if chunks == frames == 0:
        return []
    shortest = (chunks - 1) * config.chunk_stride + 1
    rests = range(shortest, shortest + config.chunk_length)
    counts = cut(rests[min(bisect_left(rests, frames, key=lambda rest: sum(cut(rest))), len(rests) - 1)])
    if sum(counts) != frames:
        raise ValueError(f"codes have {frames} frames and {chunks} scales, allowed: whole chunks and their scales")
    return list(zip(accumulate(counts, initial=0), counts))
