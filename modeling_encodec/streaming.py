"""Live coding: `StreamingEncoder` and `StreamingDecoder` take audio or codes as they come and give out what can be given.

Whole files are coded by the same steps (`EncodecModel.run_blocks`), so a stream's codes are the file's. All that a stream
remembers is one value, `StreamState`: copy it, save it, put it into another stream of the same kind, now or tomorrow.

Modes. The released causal model pads a signal's beginning with its reflection: its first frame looks at 2,240 samples
(93 ms), then every 320 samples give a frame at once. `exact` waits for those and gives the whole file's codes.
`low_latency` has silence before the signal instead: a frame after every 320 samples from the first one on, and codes
that differ for a while (see the README). Models that are not causal look ahead by a fixed amount; those with chunks code
a chunk when it is full.
"""

import functools
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from modeling_encodec.atomic import atomic_path
from modeling_encodec.batching_encodec import as_tensor
from modeling_encodec.bitstream.fingerprints import model_fingerprint
from modeling_encodec.modeling_encodec import EncodecModel, exact_float32, overlap_triangle


# What stands where a row has no code.
NO_CODE = -1
MODES = ("exact", "low_latency")


@dataclass(frozen=True)
class StreamState:
    """All that a stream of B rows remembers. A value: each push makes a new one, and none is ever written to.

    Args:
        waiting (`torch.Tensor` of shape `(B, C, W)`): samples or latents that nothing could be made of yet; of a
            decoder with chunks, audio that the next chunk overlaps.
        counts (`torch.LongTensor` of shape `(B,)`): how many of them there are, on the CPU.
        started (`torch.BoolTensor` of shape `(B,)`): whether the row's beginning is behind it, on the CPU.
        layers (tuple of `torch.Tensor`, each `(B, ...)`): what the layers keep; of a decoder with chunks, the weight
            of each waiting sample.
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
        """The state of which these are the `tensors()`."""
        layers = tuple(tensors[f"layers.{index}"] for index in range(len(tensors) - 3))
        return cls(tensors["waiting"], tensors["counts"], tensors["started"], layers)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "StreamState":
        """The state with every tensor changed."""
        return self.from_tensors({name: change(tensor) for name, tensor in self.tensors().items()})

    def rows(self, rows: list[int]) -> "StreamState":
        """The state of these rows alone."""
        return self if rows == list(range(len(self.counts))) else self.map(lambda tensor: tensor[rows])

    def with_rows(self, rows: list[int], other: "StreamState") -> "StreamState":
        """The state with these rows taken from `other`, which has them alone."""
        if rows == list(range(len(self.counts))):
            return other
        ours, theirs = self.tensors(), other.tensors()
        index = {device: torch.tensor(rows, device=device) for device in {tensor.device for tensor in ours.values()}}
        return self.from_tensors(
            {name: ours[name].index_copy(0, index[ours[name].device], theirs[name]) for name in ours}
        )

    def save(self, path: str | Path, about: dict | None = None) -> None:
        """Write a safetensors file, with the facts `about` the stream that it belongs to."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, {"stream": json.dumps(about or {})})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> tuple["StreamState", dict]:
        """The state and the facts that `save` wrote.

        Raises:
            ValueError: if the file is no stream's state.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                about = json.loads((file.metadata() or {})["stream"])
                state = cls.from_tensors({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no saved state of a stream ({error})") from None
        return replace(state, counts=state.counts.cpu(), started=state.started.cpu()), about


class _Stream:
    """What both directions share: rows, their state, and which of them can be computed together."""

    def __init__(self, model: EncodecModel, batch_size: int, mode: str, kind: str):
        config = model.config
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, allowed: {', '.join(MODES)}")
        if mode == "low_latency" and not (config.use_causal_conv and config.trim_right_ratio == 1):
            raise ValueError("mode is 'low_latency', allowed: 'exact', for this model is not causal")
        if config.chunk_length is None and (config.normalize or config.norm_type == "time_group_norm"):
            raise ValueError(
                "this model looks at the whole signal, allowed: one that does not, or with chunk_length_s"
            )
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, allowed: a whole number of at least 1")
        self.model, self.batch_size, self.mode = model, batch_size, mode
        self._about = {"kind": kind, "mode": mode, "model": model_fingerprint(model)}

    def _start(self, steps) -> None:
        self._steps = steps
        self._state = steps.beginning(self.batch_size)

    @property
    def state(self) -> StreamState:
        """All that the stream remembers. Setting it goes on from there."""
        return self._state

    @state.setter
    def state(self, state: StreamState) -> None:
        given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.tensors().items()}
        mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.tensors().items()}
        for name in mine.keys() | given.keys():
            if given.get(name) != mine.get(name):
                raise ValueError(f"state.{name} is {given.get(name)}, allowed: {mine.get(name)}, as this stream's")
        self._state = state.map(lambda tensor: tensor.to(self.model.device))
        self._state = replace(self._state, counts=state.counts.cpu(), started=state.started.cpu())

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file, from which a stream of the same kind can `restore` it."""
        self._state.save(path, self._about)

    def restore(self, path: str | Path) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: if it is none, or that of another model, mode, direction or batch size.
        """
        state, about = StreamState.load(path)
        if about != self._about:
            raise ValueError(f"{path} is the state of {about}, allowed: {self._about}")
        self.state = state

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Begin anew, in all rows or in these."""
        rows = self._check_rows(rows)
        self._state = self._state.with_rows(rows, self._steps.beginning(len(rows)))

    def _check_rows(self, rows: Iterable[int] | None) -> list[int]:
        every = list(range(self.batch_size))
        rows = every if rows is None else sorted(set(rows))
        if not rows or not set(rows) <= set(every):
            raise ValueError(f"rows are {rows}, allowed: of {every}")
        return rows

    def _advance(self, rows: list[int], pieces: list[tuple], end: bool) -> list[tuple[torch.Tensor, ...]]:
        """The next piece of each of these rows, a tuple of (1, ...) tensors -> what each row gives.

        Rows that stand at the same place are computed together, but not on a CPU, where a row is computed alone so
        that its neighbours cannot change even its rounding.
        """
        groups = {}
        for place, row in enumerate(rows):
            together = self.model.device.type != "cpu"
            stands = (bool(self._state.started[row]), int(self._state.counts[row])) if together else row
            shapes = tuple(part.shape for part in pieces[place])
            groups.setdefault((stands, shapes), []).append(place)
        given, state = [None] * len(rows), self._state
        with torch.no_grad(), exact_float32():
            for places in groups.values():
                group = [rows[place] for place in places]
                joined = tuple(torch.cat(parts) for parts in zip(*(pieces[place] for place in places)))
                outputs, after = self._steps.advance(self._state.rows(group), joined, end)
                state = state.with_rows(group, after)
                for index, place in enumerate(places):
                    given[place] = tuple(output[index : index + 1] for output in outputs)
        self._state = state
        return given

    def _gather(self, rows: list[int], parts: list[torch.Tensor], fill: float) -> torch.Tensor:
        """(1, ..., T) of these rows as one (batch_size, ..., T), filled up at the right and in other rows."""
        width = max(part.shape[-1] for part in parts)
        if len(parts) == self.batch_size == 1:
            return parts[0]
        whole = parts[0].new_full((self.batch_size, *parts[0].shape[1:-1], width), fill)
        for row, part in zip(rows, parts):
            whole[row, ..., : part.shape[-1]] = part[0]
        return whole


class StreamingEncoder(_Stream):
    """Audio to codes as it comes.

        encoder = StreamingEncoder(model, bandwidth=6.0)
        codes = encoder.push(samples)  # any number of them, as often as there are any
        codes = encoder.flush()  # the end: what was still waited with; then the next signal may begin

    `exact` gives the codes of the whole signal; equal ones, but where two codebook entries are equally near within
    float32 rounding.

    Attributes:
        scales (`torch.Tensor` of shape `(B, N)`): of a model with chunks, the loudness that each of the N chunks given
            out last was divided by, 0 where a row has no such chunk. `None` for other models.
    """

    def __init__(
        self,
        model: EncodecModel,
        bandwidth: float | None = None,
        batch_size: int = 1,
        mode: Literal["exact", "low_latency"] = "exact",
        *,
        num_quantizers: int | None = None,
    ):
        """Args:
            bandwidth: kbps, the model's smallest by default; or `num_quantizers`.
            batch_size: signals side by side; the same number of samples of each is pushed.
            mode: `exact` waits for the beginning's reflection, `low_latency` has silence before the signal.

        Raises:
            ValueError: for a model that needs the whole signal, or not causal in `low_latency`.
        """
        super().__init__(model, batch_size, mode, "encoder")
        self.num_quantizers = model.resolve_quantizers(bandwidth, num_quantizers)
        self.scales = None
        if model.config.chunk_length is None:
            finish = functools.partial(model.quantize, num_quantizers=self.num_quantizers)
            self._start(_LayerSteps(model, model.encoder, mode, _as_it_is, finish))
        else:
            self._start(_ChunkEncoding(model, self.num_quantizers))

    @property
    def latency(self) -> int:
        """Samples that must be there, from a frame's (or chunk's) first one on, for it to be given out."""
        chunk, net = self.model.config.chunk_length, self.model.encoder
        return chunk or net.hop + net.lookahead

    @property
    def start_latency(self) -> int:
        """Samples that must be there for the first frames."""
        chunk = self.model.config.chunk_length
        return chunk or (self.latency if self.mode == "low_latency" else self.model.encoder.start)

    def push(self, samples: torch.Tensor) -> torch.Tensor:
        """The next samples (B, channels, T), any T, in [-1, 1] -> the codes (B, K, F) that are ready, F from 0 on.

        `(T,)` is one mono signal, `(B, T)` several, `(2, T)` a stereo one. Rows that were reset by themselves may have
        fewer codes ready than others: -1 stands where they have none.

        Raises:
            ValueError: for samples the model cannot take. The stream is then as before.
        """
        samples = as_tensor("samples", samples)
        if samples.shape[-1:] == (0,):
            samples = samples.new_zeros(self.batch_size, self.model.config.audio_channels, 0).to(self.model.device)
        else:
            samples = self.model.check_audio(samples)
        if len(samples) != self.batch_size:
            raise ValueError(f"samples are of {len(samples)} rows, allowed: {self.batch_size}")
        return self._encode(list(range(self.batch_size)), samples.float(), end=False)

    def flush(self, rows: Iterable[int] | None = None) -> torch.Tensor:
        """End the signals of all rows, or of these: the codes (B, K, F) that are left; these rows then begin anew."""
        rows = self._check_rows(rows)
        nothing = torch.zeros(len(rows), self.model.config.audio_channels, 0, device=self.model.device)
        return self._encode(rows, nothing, end=True)

    def finish(self, samples: torch.Tensor) -> torch.Tensor:
        """The last samples of all rows: `push` and `flush` in one, to the bit what `encode` does with the whole."""
        samples = self.model.check_audio(samples)
        return self._encode(list(range(self.batch_size)), samples.float(), end=True)

    def _encode(self, rows: list[int], samples: torch.Tensor, end: bool) -> torch.Tensor:
        given = self._advance(rows, [(samples[place : place + 1],) for place in range(len(rows))], end)
        codes, *scales = zip(*given)
        if scales:
            self.scales = self._gather(rows, list(scales[0]), 0)
        return self._gather(rows, list(codes), NO_CODE)


class StreamingDecoder(_Stream):
    """Codes to audio as they come.

        decoder = StreamingDecoder(model)
        audio = decoder.push(codes)  # as often as there are any
        audio = decoder.flush()  # the end

    A signal has as many samples as its frames are long; the last frame may have begun with fewer.

    Attributes:
        lengths (`torch.LongTensor` of shape `(B,)`): samples of each row in what was given out last.
    """

    def __init__(self, model: EncodecModel, batch_size: int = 1, mode: Literal["exact", "low_latency"] = "exact"):
        super().__init__(model, batch_size, mode, "decoder")
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        if model.config.chunk_length is None:
            self._start(_LayerSteps(model, model.decoder, mode, model.embed_checked, _as_it_is))
        else:
            self._start(_ChunkDecoding(model))

    @property
    def latency(self) -> int:
        """Samples by which what is given out lags behind the frames taken, once begun."""
        config, net = self.model.config, self.model.decoder
        if config.chunk_length is not None:
            return config.num_frames(config.chunk_length) * config.hop_length - config.chunk_stride
        return net.start * config.hop_length - net.outputs(net.start)

    @property
    def start_frames(self) -> int:
        """Frames that must be there for the first audio."""
        config = self.model.config
        if config.chunk_length is not None:
            return config.num_frames(config.chunk_length)
        return 1 if self.mode == "low_latency" else self.model.decoder.start

    def push(self, codes: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """The next codes (B, K, F) -> the audio (B, channels, T) that is ready, T from 0 on.

        Of a model with chunks: whole chunks, with their `scales` (B, N), as the encoder gave them. Codes may end in -1
        in rows that have fewer; their audio ends in zeros then, see `lengths`.

        Raises:
            ValueError: for codes that the model does not have. The stream is then as before.
        """
        codes = as_tensor("codes", codes).to(self.model.device)
        if codes.dim() != 3 or codes.shape[0] != self.batch_size:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, allowed: ({self.batch_size}, codebooks, frames)")
        if (self.model.config.chunk_length is not None) != (scales is not None):
            raise ValueError(f"scales are {scales}, allowed: those of a model with chunks, of others None")
        counts = (codes != NO_CODE).any(1).sum(1).tolist()
        rows = [codes[row : row + 1, :, :count] for row, count in enumerate(counts)]
        rows = [self.model.check_codes(row) if row.numel() else row.long() for row in rows]
        pieces = [(row,) for row in rows]
        if scales is not None:
            scales = as_tensor("scales", scales).float().to(self.model.device)
            if scales.dim() != 2 or len(scales) != self.batch_size or not torch.isfinite(scales).all():
                raise ValueError(f"scales are {scales}, allowed: finite, ({self.batch_size}, chunks)")
            there = (scales != 0).sum(1).tolist()
            pieces = [(row, scales[index : index + 1, : there[index]]) for index, row in enumerate(rows)]
        return self._decode(list(range(self.batch_size)), pieces, end=False)

    def flush(self, rows: Iterable[int] | None = None) -> torch.Tensor:
        """End the signals of all rows, or of these: the audio (B, channels, T) that is left; then they begin anew."""
        rows = self._check_rows(rows)
        nothing = torch.zeros(1, 1, 0, dtype=torch.int64, device=self.model.device)
        piece = (nothing,) if self.model.config.chunk_length is None else (nothing, nothing[0].float())
        return self._decode(rows, [piece] * len(rows), end=True)

    def _decode(self, rows: list[int], pieces: list[tuple], end: bool) -> torch.Tensor:
        audio = [given for (given,) in self._advance(rows, pieces, end)]
        self.lengths = torch.zeros(self.batch_size, dtype=torch.int64)
        self.lengths[rows] = torch.tensor([part.shape[-1] for part in audio])
        return self._gather(rows, audio, 0)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


# ---- how rows that stand at the same place go on -----------------------------------------------------------------


class _LayerSteps:
    """Layers that remember: the encoder or the decoder of a model that codes the whole signal."""

    def __init__(self, model: EncodecModel, net: torch.nn.Module, mode: str, prepare: Callable, finish: Callable):
        self.model, self.net, self.prepare, self.finish = model, net, prepare, finish
        self.begun = mode == "low_latency"  # silence before the signal is a state as any
        channels = model.config.audio_channels, model.config.hidden_size
        self.channels, self.channels_out = channels if net is model.encoder else reversed(channels)

    def beginning(self, rows: int) -> StreamState:
        """The state of rows that nothing was pushed to."""
        width = max(self.net.hop, 0 if self.begun else self.net.start) - 1
        return StreamState(
            torch.zeros(rows, self.channels, width, device=self.model.device),
            torch.zeros(rows, dtype=torch.int64),
            torch.full((rows,), self.begun),
            self.net.quiet_state(rows),
        )

    def advance(self, state: StreamState, inputs: tuple, end: bool) -> tuple[tuple, StreamState]:
        """The next inputs of rows that stand at one place -> what can be made of them and those that waited."""
        x = torch.cat([state.waiting[..., : int(state.counts[0])], self.prepare(inputs[0])], dim=2)
        started, total, hop = bool(state.started[0]), x.shape[2], self.net.hop
        least = 0 if started else self.net.start
        used = total if end else least + (total - least) // hop * hop if total >= least else 0
        outputs, layers = [self.finish(x.new_zeros(len(x), self.channels_out, 0))], state.layers
        if used or (end and started):
            for output, layers in self.model.run_blocks(self.net, x[..., :used], layers if started else None, end):
                outputs.append(self.finish(output))
        if end:
            return (torch.cat(outputs, dim=2),), self.beginning(len(x))
        waiting = torch.nn.functional.pad(x[..., used:], (0, state.waiting.shape[2] - (total - used)))
        counts, begun = torch.full_like(state.counts, total - used), state.started | (used > 0)
        return (torch.cat(outputs, dim=2),), StreamState(waiting, counts, begun, layers)


class _ChunkEncoding:
    """Chunks, each coded when it is full."""

    def __init__(self, model: EncodecModel, num_quantizers: int):
        self.model, self.num_quantizers = model, num_quantizers

    def beginning(self, rows: int) -> StreamState:
        """The state of rows that nothing was pushed to."""
        config = self.model.config
        waiting = torch.zeros(rows, config.audio_channels, config.chunk_length - 1, device=self.model.device)
        return StreamState(waiting, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool), ())

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
        waiting = torch.nn.functional.pad(x, (0, config.chunk_length - 1 - x.shape[2]))
        counts = torch.full_like(state.counts, x.shape[2])
        return (codes, scales), StreamState(waiting, counts, state.started | bool(spans), ())


class _ChunkDecoding:
    """Chunks, each added to what the ones before it left where they overlap."""

    def __init__(self, model: EncodecModel):
        config = model.config
        self.model, self.full = model, config.num_frames(config.chunk_length)
        self.hop, self.stride = config.hop_length, config.chunk_stride

    def beginning(self, rows: int) -> StreamState:
        """The state of rows that nothing was pushed to."""
        config, device = self.model.config, self.model.device
        width = self.full * config.hop_length
        return StreamState(
            torch.zeros(rows, config.audio_channels, width, device=device),
            torch.zeros(rows, dtype=torch.int64),
            torch.zeros(rows, dtype=torch.bool),
            (torch.zeros(rows, 1, width, device=device),),
        )

    def advance(self, state: StreamState, inputs: tuple, end: bool) -> tuple[tuple, StreamState]:
        """The next whole chunks of rows that stand at one place -> the audio that no later chunk overlaps."""
        (codes, scales), (waiting, weight) = inputs, (state.waiting.clone(), state.layers[0].clone())
        frames, stride, length = self._split(scales.shape[1], codes.shape[2]), self.stride, int(state.counts[0])
        pieces = [codes[row : row + 1, :, at : at + n] for row in range(len(codes)) for at, n in frames]
        factors = scales.reshape(-1) if self.model.config.normalize else None
        decoded = self.model.decode_pieces(pieces, factors)
        # A first chunk that is not full is followed by the end: then no triangle is longer.
        longest = self.full if state.started[0] or not frames else frames[0][1]
        triangle = overlap_triangle(longest * self.hop, waiting.device)
        outputs = [waiting[..., :0]]

        def give(count: int) -> None:
            nonlocal waiting, weight
            outputs.append(waiting[..., :count] / weight[..., :count])
            waiting, weight = (torch.nn.functional.pad(part[..., count:], (0, count)) for part in (waiting, weight))

        for number, (_, count) in enumerate(frames):
            chunk = torch.cat(decoded[number :: len(frames)]).float()
            part = triangle[: chunk.shape[2]]
            waiting[..., : len(part)] += part * chunk
            weight[..., : len(part)] += part
            length = max(length, len(part))
            if count == self.full or number < len(frames) - 1:
                give(stride)
                length -= stride
        if end:
            give(length)
        audio = torch.cat(outputs, dim=2).to(self.model.dtype)
        if end:
            return (audio,), self.beginning(len(waiting))
        started = state.started | bool(frames)
        return (audio,), StreamState(waiting, torch.full_like(state.counts, length), started, (weight,))

    def _split(self, chunks: int, frames: int) -> list[tuple[int, int]]:
        """(start, frames) of each of so many chunks: full ones, unless they are a signal's last, whose end cuts the
        last and those that overlap it."""
        config = self.model.config

        def cut(rest: int) -> list[int]:
            starts = range(0, chunks * self.stride, self.stride)
            return [config.num_frames(min(config.chunk_length, rest - start)) for start in starts]

        if chunks == 0 and frames == 0:
            return []
        shortest, longest = (chunks - 1) * self.stride + 1, (chunks - 1) * self.stride + config.chunk_length
        rests = range(shortest, longest + 1)
        counts = cut(rests[min(bisect_left(rests, frames, key=lambda rest: sum(cut(rest))), len(rests) - 1)])
        if chunks == 0 or sum(counts) != frames:
            raise ValueError(
                f"codes have {frames} frames and {chunks} scales, allowed: one scale a chunk, whole chunks"
            )
        return [(sum(counts[:index]), count) for index, count in enumerate(counts)]
