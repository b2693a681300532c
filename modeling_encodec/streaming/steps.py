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

from modeling_encodec.models.chunks_encodec import overlap_triangle
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.weight_cache_encodec import last_compared, marks, values_read
from modeling_encodec.system.atomic import atomic_path


@dataclass(frozen=True)
class StreamState:
    """All that a stream of B rows remembers. A value: each push makes a new one, and none is ever written to.

    Args:
        waiting (torch.Tensor of shape (B, C, W)): samples or latents that nothing could be made of yet; of a
            decoder with chunks, audio that the next chunk overlaps.
        counts (torch.LongTensor of shape (B,)): how many of them there are, on the CPU.
        started (torch.BoolTensor of shape (B,)): whether the row's beginning is behind it, on the CPU.
        layers (tuple of torch.Tensor, each (B, ...)): what the layers keep; of a decoder with chunks, the weight
            of each waiting sample, and, on the CPU, the first and last chunk's frames.

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

    def on(self, device: str | torch.device) -> "StreamState":
        """The state for a stream that computes on `device`: whole numbers and flags are on the CPU always."""
        return self.map(lambda tensor: tensor.to(device if tensor.is_floating_point() else "cpu"))

    @classmethod
    def joined(cls, states: list["StreamState"]) -> "StreamState":
        """The rows of all `states`, one after the other."""
        if len(states) == 1:
            return states[0]
        parts = [state.tensors() for state in states]
        return cls.from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def rows(self, rows: list[int]) -> "StreamState":
        """The state of these `rows` alone."""
        return self if rows == list(range(len(self.counts))) else self.map(lambda tensor: of_rows(tensor, rows))

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
        return state.on(device), about


def of_rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """These `rows` of a (B, ...) tensor; where they lie together, not copied: the layout of a copy may be another, by
    which kernels are chosen."""
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    return x[rows[0] : rows[0] + len(rows)] if together else x[rows]


def _channels_last(part: torch.Tensor) -> torch.Tensor:
    """A layer's state; of one sample (B, C, 1, 1) in this very layout, where what loads or joins states left another:
    kernels are chosen by it, and a row would round otherwise than alone."""
    if part.shape[2:] != (1, 1) or part.stride(3) >= part.shape[1]:
        return part
    return torch.empty_like(part, memory_format=torch.channels_last).copy_(part)


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
        graph_rows: int | None = None,
        onnx_hop=None,
    ):
        """`prepare` makes the network's inputs of what is pushed, `finish` what is given out of its outputs and the
        sizes of their blocks; `onnx_hop` does it all for one hop. So does a CUDA graph where `graph_rows` are computed
        together, which is all of them: each smaller number would take a graph, recorded while a hop is waited for."""
        net.check_pieces()
        self.model, self.net, self.prepare, self.finish, self.onnx_hop = model, net, prepare, finish, onnx_hop
        self.graph_rows, self.graphs = graph_rows, {}
        self.dtype = model.compute_dtype  # states are of it: setting the model's precision later changes nothing here
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
            self.net.quiet_state(rows, self.dtype),
        )

    def places(self, state: StreamState) -> list[tuple]:
        """Where each row stands: rows at one place can be computed together."""
        return list(zip(state.started.tolist(), state.counts.tolist()))

    def advance(self, state: StreamState, inputs: tuple, end: bool) -> tuple[tuple, StreamState]:
        """The next inputs of rows that stand at one place -> what can be made of them and those that waited."""
        (x,), started, waits, hop = inputs, bool(state.started[0]), int(state.counts[0]), self.net.hop
        total, least = waits + x.shape[2], 0 if started else self.net.start
        used = total if end else least + (total - least) // hop * hop if total >= least else 0
        one_hop = started and not end and used == hop
        if one_hop and waits == 0 and total == hop and self.onnx_hop is not None and self.onnx_hop.fits(x):
            given, layers = self.onnx_hop(x, state.layers)
            return (given,), replace(state, layers=layers)
        recorded = one_hop and len(x) == self.graph_rows
        if not (recorded and waits == 0):  # a decoder that has begun takes frame by frame, and none wait
            x = torch.cat([state.waiting[..., :waits], self.prepare(x) if self.prepare else x], dim=2)
        if recorded:
            given, layers = self._by_graph(x[..., :used], state.layers)
        else:
            given, layers = self._run(x[..., :used], state.layers, started, end)
        if end:
            return (given,), self.beginning(len(x))
        if waits == 0 and used == total:
            return (given,), replace(state, started=state.started | (used > 0), layers=layers)
        waiting = F.pad(x[..., used:], (0, state.waiting.shape[2] - (total - used)))
        counts, begun = torch.full_like(state.counts, total - used), state.started | (used > 0)
        return (given,), StreamState(waiting, counts, begun, layers)

    def _run(self, x: torch.Tensor, layers: tuple, started: bool, end: bool) -> tuple[torch.Tensor, tuple]:
        """What is given out for the next inputs of the network, and its layers' states then."""
        given, sizes = x.new_zeros(len(x), self.channels_out, 0), [0]
        if x.shape[2] or (end and started):
            before = tuple(map(_channels_last, layers)) if started else None
            given, layers = self.net.step(x, before, end, dtype=self.dtype)
            sizes = self.net.block_outputs(x, started, given.shape[2]) if self.finish else None
        return self.finish(given, blocks=sizes) if self.finish else given.to(self.model.dtype), layers

    def hop(self, x: torch.Tensor, layers: tuple) -> tuple[torch.Tensor, tuple]:
        """What is given out for one hop of rows that have begun, and the layers' states then."""
        return self._run(self.prepare(x) if self.prepare else x, layers, True, False)

    def _by_graph(self, x: torch.Tensor, layers: tuple) -> tuple[torch.Tensor, tuple]:
        """`hop` by a CUDA graph, recorded at the first, and anew when PyTorch says that weights have changed.

        It does not say so of every change. So whenever weights are to be compared, once a second, the hop is taken
        without the graph: that brings what is kept of them, which the graph reads, up to date.
        """
        graph = self.graphs.get(x.shape)
        if graph is None or not graph.fits():
            self.graphs = {shape: other for shape, other in self.graphs.items() if other.fits()}
            graph = self.graphs[x.shape] = _GraphedHop(self, x, layers)
        elif graph.compared != last_compared():
            graph.compared = last_compared()
            return self.hop(x, layers)
        return graph(x, layers)


class _GraphedHop:
    """`LayerSteps.hop` as a CUDA graph: some 150 small kernels by one call.

    The layers' states stay in its own memory from hop to hop, unless those given are not the ones it left there. All
    that it reads it keeps alive.
    """

    def __init__(self, steps: LayerSteps, x: torch.Tensor, layers: tuple):
        modules = [*steps.net.modules(), *steps.model.quantizer.modules()]
        self.tables = [table for module in modules for table in (module._parameters, module._buffers) if table]
        # Not in inference mode: of tensors made there none could be written to later.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device), values_read() as values:
            self.x = x.clone(memory_format=torch.contiguous_format)
            self.layers = tuple(part.clone() for part in layers)
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries must have chosen their kernels before anything is recorded
                for _ in range(3):
                    steps.hop(self.x, self.layers)
            torch.cuda.current_stream().wait_stream(aside)
            self.marks, self.compared = marks(self._tensors()), last_compared()  # an LSTM's have been put in one piece
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may use the device
                self.given, after = steps.hop(self.x, self.layers)
                torch._foreach_copy_(self.layers, after)
        self.kept = values, [tensor.detach() for tensor in self._tensors()]

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for table in self.tables for tensor in table.values() if tensor is not None]

    def fits(self) -> bool:
        """Whether the weights are still those it was recorded with, as far as PyTorch knows."""
        return marks(self._tensors()) == self.marks

    def __call__(self, x: torch.Tensor, layers: tuple) -> tuple[torch.Tensor, tuple]:
        self.x.copy_(x)
        if layers is not self.layers:
            torch._foreach_copy_(self.layers, layers)
        self.graph.replay()
        return self.given.clone(), self.layers


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

    def places(self, state: StreamState) -> list[int]:
        """Where each row stands: rows at one place can be computed together."""
        return state.counts.tolist()

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
            (weight, torch.zeros(rows, 2, dtype=torch.int64, device="cpu")),
        )

    def places(self, state: StreamState) -> list[tuple]:
        """Where each row stands: rows at one place can be computed together."""
        return [(count, *spans) for count, spans in zip(state.counts.tolist(), state.layers[1].tolist())]

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
        layers = weight, torch.tensor([[first, last]], dtype=torch.int64, device="cpu").expand(len(weight), 2)
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
