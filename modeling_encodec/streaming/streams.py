"""Live coding: `StreamingEncoder` and `StreamingDecoder` take audio or codes as they come.

Whole files are coded by the same steps, so a stream's codes are the file's. All that a
stream remembers is one value, `StreamState`: copy it, save it, put it into another stream of its kind, at any time.

Modes. The released causal model pads a signal's beginning with its reflection: its first frame looks at 2,240 samples
(93 ms); then every 320 samples give a frame at once. `exact` waits for those and gives the whole file's codes.
`low_latency` has silence before the signal instead: a frame after every 320 samples from the first one on, and codes
that differ for a while (docs/streaming.md). Models that are not causal look ahead by a fixed amount; those with chunks
code a chunk when it is full.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch

from modeling_encodec.models.batching_encodec import as_audio, as_codes, as_tensor, to_device
from modeling_encodec.models.fingerprints import stream_fingerprint
from modeling_encodec.models.inputs_encodec import as_python, whole_number
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import NO_CODE
from modeling_encodec.models.precision_encodec import exact_float32
from modeling_encodec.models.weight_cache_encodec import now, unchanged_weights
from modeling_encodec.streaming.steps import (
    ChunkDecoding,
    ChunkEncoding,
    LayerSteps,
    StreamState,
    of_rows,
    split_chunks,
)


MODES = ("exact", "low_latency")


class _Stream:
    """What both directions share: rows, their state, and which of them can be computed together."""

    def __init__(self, model: EncodecModel, batch_size: int, mode: str, kind: str, cuda_graphs: bool):
        config = model.config
        if cuda_graphs and model.device.type != "cuda":
            raise ValueError(f"cuda_graphs is True on {model.device}, allowed: on a CUDA device")
        if cuda_graphs and any(parameter.device.type == "meta" for parameter in model.parameters()):
            raise ValueError("cuda_graphs is True and weights are offloaded, allowed: all of them on the device")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, allowed: {', '.join(MODES)}")
        if mode == "low_latency" and not (config.use_causal_conv and config.trim_right_ratio == 1):
            raise ValueError("mode is 'low_latency', allowed: 'exact', for this model is not causal")
        if config.needs_whole_signal:
            raise ValueError(
                "this model looks at the whole signal, allowed: one that has chunks, or does not normalise"
            )
        self.model, self.batch_size, self.mode = model, whole_number("batch_size", batch_size, 1), mode
        self._kind, self._compared, self._since_then = kind, None, 0
        self._options = {"batch_size": self.batch_size, "mode": mode, "cuda_graphs": cuda_graphs}

    def _start(self, steps) -> None:
        self._steps = steps
        self._state = steps.beginning(self.batch_size)

    def __reduce__(self):
        given = {name: value for name, value in vars(self).items() if name in ("scales", "lengths")}
        return _stream_again, (type(self), self.model, self._options, self.state, given)

    @property
    def state(self) -> StreamState:
        """All that the stream remembers. Setting it goes on from there; one of another kind is a ValueError."""
        return self._state.map(torch.clone) if self._options["cuda_graphs"] else self._state  # graphs write to theirs

    @state.setter
    def state(self, state: StreamState) -> None:
        given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.tensors().items()}
        mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.tensors().items()}
        for name in mine.keys() | given.keys():
            if given.get(name) != mine.get(name):
                raise ValueError(f"state.{name} is {given.get(name)}, allowed: {mine.get(name)}, as this stream's")
        most = state.waiting.shape[2]
        if not ((state.counts >= 0) & (state.counts <= most)).all():
            raise ValueError(f"state.counts are {state.counts.tolist()}, allowed: 0 to {most}")
        self._state = state.on(self.model.device)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file at `path`, from which a stream of the same kind can `restore` it."""
        self._state.save(path, self._about())

    def _about(self) -> dict[str, str]:
        """What a state belongs to."""
        return {"kind": self._kind, "mode": self.mode, "model": stream_fingerprint(self.model)}

    def restore(self, path: str | Path) -> None:
        """Go on from the state that was saved at `path`.

        Raises:
            ValueError: if it is none, or that of another model, mode, direction or batch size.
            FileNotFoundError: if there is no such file.
        """
        state, about = StreamState.load(path)
        if about != (mine := self._about()):
            raise ValueError(f"{path} is the state of {about}, allowed: {mine}")
        self.state = state

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Begin anew, in all rows or in these `rows`; a ValueError for rows that there are not."""
        rows = self._check_rows(rows)
        self._state, self._compared = self._state.with_rows(rows, self._steps.beginning(len(rows))), None

    def _check_rows(self, rows: Iterable[int] | None) -> list[int]:
        every = list(range(self.batch_size))
        rows = every if rows is None else sorted({whole_number("a row", row) for row in as_python(rows)})
        if not rows or not set(rows) <= set(every):
            raise ValueError(f"rows are {rows}, allowed: of {every}")
        return rows

    def _advance(self, rows: list[int], inputs: tuple[torch.Tensor, ...], widths: list[tuple], end: bool) -> list:
        """The next `inputs` (R, ..., T) of these R rows, of which each row has as many as its `widths` say -> (rows,
        what they give) of those that were computed together.

        These are rows that stand at the same place, but not on a CPU, where a row is computed alone so that its
        neighbours cannot change even its rounding.
        """
        places = self._steps.places(self._state) if self.model.computes_rows_together else range(self.batch_size)
        groups = {}
        for index, row in enumerate(rows):
            groups.setdefault((places[row], widths[index]), []).append(index)
        given, states = [], []
        with torch.no_grad(), exact_float32(), unchanged_weights(self._last_comparison(widths, end)):
            for (_, width), group in groups.items():
                chosen = [rows[index] for index in group]
                parts = tuple(of_rows(part[..., :count], group) for part, count in zip(inputs, width))
                outputs, after = self._steps.advance(self._state.rows(chosen), parts, end)
                given.append((chosen, outputs))
                states.append(after)
            order = [row for chosen, _ in given for row in chosen]
            self._state = self._state.with_rows(order, StreamState.joined(states))
        return given

    def _last_comparison(self, widths: list[tuple], end: bool) -> int:
        """When the weights were last compared with their copies, which takes too long for every push: at a signal's
        beginning, and after each second."""
        second = self.model.config.sampling_rate if self._kind == "encoder" else self.model.config.frame_rate
        if self._compared is None or self._since_then >= second:
            self._compared, self._since_then = now(), 0
        self._since_then += max(width[0] for width in widths)
        since, self._compared = self._compared, None if end else self._compared
        return since

    def _gather(self, given: list[tuple[list[int], torch.Tensor]], fill: float) -> torch.Tensor:
        """(R, ..., T) of each of these rows as one (batch_size, ..., T), filled up at the right and in other rows."""
        every, part = given[0]
        if every == list(range(self.batch_size)):
            return part
        width = max(part.shape[-1] for _, part in given)
        whole = part.new_full((self.batch_size, *part.shape[1:-1], width), fill)
        for rows, part in given:
            whole[rows, ..., : part.shape[-1]] = part
        return whole


def _stream_again(kind: type, model: EncodecModel, options: dict, state: StreamState, given: dict) -> _Stream:
    """The stream that was pickled."""
    stream = kind(model, **options)
    stream.state = state
    vars(stream).update(given)
    return stream


class StreamingEncoder(_Stream):
    """Audio to codes as it comes (paper 3.1): `push` as often as there are samples, `flush` at the end.

    `exact` gives the codes of the whole signal; equal ones, but where two codebook entries are equally near within
    float32 rounding.

    Attributes:
        scales (torch.Tensor of shape (B, N)): of a model with chunks, the loudness that each of the N chunks given
            out last was divided by, 0 where a row has no such chunk. `None` for other models.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecModel, StreamingEncoder, bundled_checkpoint
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> audio = 0.1 * torch.randn(1, 1, 6400)
        >>> encoder = StreamingEncoder(model, bandwidth=6.0, mode="low_latency")
        >>> codes = [encoder.push(hop) for hop in audio.split(320, dim=2)] + [encoder.flush()]
        >>> [piece.shape[2] for piece in codes] == [1] * 20 + [0]  # a frame for each 13.3 ms
        True
    """

    def __init__(
        self,
        model: EncodecModel,
        bandwidth: float | None = None,
        batch_size: int = 1,
        mode: Literal["exact", "low_latency"] = "exact",
        *,
        num_quantizers: int | None = None,
        cuda_graphs: bool = False,
        onnx_step: str | Path | None = None,
    ):
        """Args:
            model: the codec, on the device that computes.
            bandwidth: kbps, one of the model's, its first by default; or `num_quantizers`, the codebooks.
            batch_size: signals side by side; the same number of samples of each is pushed.
            mode: `exact` waits for the beginning's reflection, `low_latency` has silence before the signal.
            cuda_graphs: on a GPU, take one hop of all rows by a recorded graph, which is recorded anew when weights
                change. Hooks on the model's layers are called then and once a second, not at each hop.
            onnx_step: `encoder_step.onnx` as exported from this model; pushes of one hop are then done by onnxruntime.

        Raises:
            ValueError: for a model that needs the whole signal, or is not causal in `low_latency`; for a bandwidth it
                does not have; for `cuda_graphs` off a GPU, or an `onnx_step` off a CPU or of another model.
            FileNotFoundError: if there is no such `onnx_step`.
            ImportError: for an `onnx_step` without `onnxruntime`.
        """
        super().__init__(model, batch_size, mode, "encoder", cuda_graphs)
        self.num_quantizers = model.resolve_quantizers(bandwidth, num_quantizers)
        self._options |= {"num_quantizers": self.num_quantizers, "onnx_step": onnx_step}
        self.scales = None
        if model.config.chunk_length is None:
            finish = functools.partial(model.quantize, num_quantizers=self.num_quantizers)
            hop = _onnx_hop(onnx_step, "encoder", model, self.num_quantizers)
            options = {"finish": finish, "graph_rows": self.batch_size if cuda_graphs else None, "onnx_hop": hop}
            self._start(LayerSteps(model, model.encoder, mode, **options))
        else:
            self._start(ChunkEncoding(model, self.num_quantizers))

    @property
    def latency(self) -> int:
        """Samples that must be there, from a frame's (or chunk's) first one on, for it to be given out."""
        chunk, net = self.model.config.chunk_length, self.model.encoder
        return chunk or net.hop + net.lookahead

    @property
    def start_latency(self) -> int:
        """Samples that must be there for the first frames (of a model with chunks, for the first chunk)."""
        chunk = self.model.config.chunk_length
        return chunk or (self.latency if self.mode == "low_latency" else self.model.encoder.start)

    def push(self, samples: torch.Tensor) -> torch.Tensor:
        """The next `samples` (B, channels, T), any T, in [-1, 1] -> the codes (B, K, F) that are ready, F from 0 on.

        `(T,)` is one mono signal, `(B, T)` several, `(2, T)` a stereo one. Rows that were reset by themselves may have
        fewer codes ready than others: -1 stands where they have none.

        Raises:
            ValueError: for samples the model cannot take. The stream is then as before.
        """
        return self._encode(list(range(self.batch_size)), self._check_samples(samples), end=False)

    def flush(self, rows: Iterable[int] | None = None) -> torch.Tensor:
        """End the signals of all rows, or of these `rows`: the codes (B, K, F) that are left; they then begin anew."""
        rows = self._check_rows(rows)
        return self._encode(rows, self._no_samples(len(rows)), end=True)

    def finish(self, samples: torch.Tensor) -> torch.Tensor:
        """The last `samples` of all rows: `push` and `flush` in one, to the bit what `encode` does with the whole."""
        return self._encode(list(range(self.batch_size)), self._check_samples(samples), end=True)

    def _check_samples(self, samples: torch.Tensor) -> torch.Tensor:
        samples = as_audio("samples", samples)
        if samples.shape[-1:] == (0,):
            return self._no_samples(self.batch_size)
        samples = self.model.check_audio(samples)
        if len(samples) != self.batch_size:
            raise ValueError(f"samples are of {len(samples)} rows, allowed: {self.batch_size}")
        return samples.float()

    def _no_samples(self, rows: int) -> torch.Tensor:
        return torch.zeros(rows, self.model.config.audio_channels, 0, dtype=torch.float32, device=self.model.device)

    def _encode(self, rows: list[int], samples: torch.Tensor, end: bool) -> torch.Tensor:
        given = self._advance(rows, (samples,), [(samples.shape[2],)] * len(rows), end)
        if self.model.config.chunk_length is not None:
            self.scales = self._gather([(chosen, scales) for chosen, (_, scales) in given], 0)
        return self._gather([(chosen, codes) for chosen, (codes, *_) in given], NO_CODE)


class StreamingDecoder(_Stream):
    """Codes to audio as they come (paper 3.1): `push` as often as there are codes, `flush` at the end.

    A signal has as many samples as its frames are long; the last frame may have begun with fewer.

    Attributes:
        lengths (torch.LongTensor of shape (B,)): samples of each row in what was given out last.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecModel, StreamingDecoder, bundled_checkpoint
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> codes = torch.randint(1024, (1, 8, 20))
        >>> decoder = StreamingDecoder(model)
        >>> audio = [decoder.push(frame) for frame in codes.split(1, dim=2)] + [decoder.flush()]
        >>> with torch.no_grad():
        ...     whole = model.decode(codes).audio_values
        >>> torch.allclose(torch.cat(audio, dim=2), whole, atol=1e-4)
        True
    """

    def __init__(
        self,
        model: EncodecModel,
        batch_size: int = 1,
        mode: Literal["exact", "low_latency"] = "exact",
        *,
        cuda_graphs: bool = False,
        onnx_step: str | Path | None = None,
    ):
        """Args:
            model: the codec, on the device that computes.
            batch_size: signals side by side.
            mode: that of the encoder.
            cuda_graphs: as of `StreamingEncoder`.
            onnx_step: `decoder_step.onnx`, used for pushes of one frame of as many codebooks as it was exported with.

        Raises:
            ValueError: as of `StreamingEncoder`; so are FileNotFoundError and ImportError.
        """
        super().__init__(model, batch_size, mode, "decoder", cuda_graphs)
        self._options |= {"onnx_step": onnx_step}
        self.lengths = torch.zeros(self.batch_size, dtype=torch.int64, device="cpu")
        if model.config.chunk_length is None:
            hop = _onnx_hop(onnx_step, "decoder", model)
            rows = self.batch_size if cuda_graphs else None
            options = {"prepare": model.embed_checked, "graph_rows": rows, "onnx_hop": hop}
            self._start(LayerSteps(model, model.decoder, mode, **options))
        else:
            self._start(ChunkDecoding(model))

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
        """The next `codes` (B, K, F) -> the audio (B, channels, T) that is ready, T from 0 on.

        Of a model with chunks: whole chunks, with their `scales` (B, N), as the encoder gave them. Codes may end in -1
        in rows that have fewer; their audio ends in zeros then, see `lengths`.

        Raises:
            ValueError: for codes that the model does not have. The stream is then as before.
        """
        return self._decode(list(range(self.batch_size)), *self._pieces(codes, scales), end=False)

    def _pieces(self, codes: torch.Tensor, scales: torch.Tensor | None) -> tuple[tuple, list[tuple]]:
        """Codes, and scales if there are any, on the model's device, and how many of them count in each row. They are
        looked at on the CPU, to which few bytes go, rather than wait for the device at each question."""
        config, codes = self.model.config, as_tensor("codes", codes)
        shape = (self.batch_size, config.num_quantizers)
        if codes.dim() != 3 or codes.shape[0] != shape[0] or not 1 <= codes.shape[1] <= shape[1]:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}, allowed: ({shape[0]}, 1 to {shape[1]} codebooks, frames)"
            )
        if (config.chunk_length is not None) != (scales is not None):
            raise ValueError(f"scales are {scales}, allowed: those of a model with chunks, of others None")
        codes = as_codes("codes", codes)
        here = codes.cpu()
        counts = (here != NO_CODE).any(1).sum(1).tolist()
        for rows, count in ((slice(None), counts[0]),) if len(set(counts)) == 1 else enumerate(counts):
            if count:
                self.model.check_codes(here[rows, :, :count])
        codes = to_device(codes, self.model.device)
        if scales is None:
            return (codes,), [(count,) for count in counts]
        scales = as_tensor("scales", scales).float()
        here = scales.cpu()
        if here.dim() != 2 or len(here) != self.batch_size or not torch.isfinite(here).all():
            raise ValueError(f"scales are {here}, allowed: finite, ({self.batch_size}, chunks)")
        there = (here != 0).sum(1).tolist()
        if any((row[:count] == 0).any() for row, count in zip(here, there)):
            raise ValueError(f"scales are {here.tolist()}, allowed: 0 only after a row's chunks")
        return (codes, to_device(scales, self.model.device)), list(zip(counts, there))

    def finish(self, codes: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """The last `codes`, and `scales`, of all rows: `push` and `flush` in one, to the bit what `decode` does."""
        return self._decode(list(range(self.batch_size)), *self._pieces(codes, scales), end=True)

    def flush(self, rows: Iterable[int] | None = None) -> torch.Tensor:
        """End the signals of all rows, or of these `rows`: the audio (B, channels, T) left; then they begin anew."""
        rows = self._check_rows(rows)
        nothing = torch.zeros(len(rows), 1, 0, dtype=torch.int64, device=self.model.device)
        inputs = (nothing,) if self.model.config.chunk_length is None else (nothing, nothing[:, 0].float())
        return self._decode(rows, inputs, [(0,) * len(inputs)] * len(rows), end=True)

    def _decode(self, rows: list[int], inputs: tuple[torch.Tensor, ...], widths: list[tuple], end: bool):
        given = [(chosen, audio) for chosen, (audio,) in self._advance(rows, inputs, widths, end)]
        lengths = [0] * self.batch_size
        for chosen, audio in given:
            for row in chosen:
                lengths[row] = audio.shape[-1]
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        return self._gather(given, 0)


def _onnx_hop(path: str | Path | None, kind: str, model: EncodecModel, num_quantizers: int | None = None):
    if path is None:
        return None
    from modeling_encodec.models.onnx_export import OnnxHop

    if model.device.type != "cpu" or model.compute_dtype != torch.float32:
        raise ValueError(f"onnx_step is given on {model.device} in {model.compute_dtype}, allowed: cpu, float32")
    return OnnxHop(path, kind, model, num_quantizers)


# ---- signals of any length -----------------------------------------------------------------------------------------


def encode_blocks(
    model: EncodecModel, blocks: Iterable[torch.Tensor], num_quantizers: int
) -> Iterator[tuple[torch.Tensor, float | None]]:
    """Codes (K, F) of one signal that comes in blocks (channels, T), in memory that does not grow with it.

    Of a model with chunks one chunk at a time, with its scale. To the bit the codes of `encode`, however the signal is
    cut. Blocks are arrays or tensors, and none is empty.
    """
    if model.config.needs_whole_signal:
        whole = torch.cat([as_audio("audio", block) for block in blocks], dim=1)
        coded = model.encode(whole[None], num_quantizers=num_quantizers)
        yield coded.audio_codes[0, 0], coded.audio_scales[0].item() if model.config.normalize else None
        return
    encoder = StreamingEncoder(model, num_quantizers=num_quantizers)
    length = model.config.chunk_stride or model.block_frames * model.config.hop_length
    for block, last in cut_blocks((as_audio("audio", block) for block in blocks), length):
        yield from signal_pieces(encoder, (encoder.finish if last else encoder.push)(block[None]))


def signal_pieces(encoder: StreamingEncoder, codes: torch.Tensor) -> Iterator[tuple[torch.Tensor, float | None]]:
    """The codes (1, K, F) that `encoder` has just given out, of one signal: of a model with chunks each chunk's, with
    its scale."""
    if encoder.scales is None:
        yield codes[0], None
        return
    scales = encoder.scales[0].tolist()
    config = encoder.model.config
    for scale, (start, frames) in zip(scales, split_chunks(config, len(scales), codes.shape[2])):
        yield codes[0, :, start : start + frames], scale if config.normalize else None


def decode_blocks(model: EncodecModel, pieces: Iterable[tuple[torch.Tensor, float | None]]) -> Iterator[torch.Tensor]:
    """Audio (channels, T) of one signal's codes as `encode_blocks` gives them, to the bit that of `decode`, but for
    the cut to its length."""
    pieces = ((as_codes("codes", codes), scale) for codes, scale in pieces)
    if model.config.needs_whole_signal:
        codes, scales = zip(*pieces)
        with torch.no_grad():
            yield model.decode(torch.cat(codes, dim=1)[None, None], [scales[0]]).audio_values[0]
        return
    decoder = StreamingDecoder(model)
    if model.config.chunk_length is not None:
        for codes, scale in pieces:
            scale = torch.tensor([[1.0 if scale is None else scale]], dtype=torch.float32, device="cpu")
            yield decoder.push(codes[None], scale)[0]
        yield decoder.flush()[0]
        return
    for codes, last in cut_blocks((codes for codes, _ in pieces), model.block_frames):
        yield (decoder.finish if last else decoder.push)(codes[None])[0]


def cut_blocks(blocks: Iterable[torch.Tensor], length: int) -> Iterator[tuple[torch.Tensor, bool]]:
    """`blocks` (..., T), cut and joined anew to (..., `length`), and whether each is the last, which may be shorter.

    Raises:
        ValueError: if there are no blocks.
    """
    kept, samples = [], 0  # joined when they are enough, for there may be very many
    for block in blocks:
        block = as_tensor("a block", block)
        kept.append(block)
        samples += block.shape[-1]
        if samples > length:
            whole = _joined(kept)
            while whole.shape[-1] > length:
                yield whole[..., :length], False
                whole = whole[..., length:]
            kept, samples = [whole], whole.shape[-1]
    if not kept:
        raise ValueError("the signal holds nothing, allowed: at least one block")
    yield _joined(kept), True


def _joined(blocks: list[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
