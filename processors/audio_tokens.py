"""Audio to codes and back, clip by clip: what every way of tokenising a corpus shares.

On a CPU a clip is computed alone and with one thread, so that its codes are the same bits in any batch and process;
processes, not threads, are what makes it fast. An accelerator computes clips of similar lengths together.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import transformers

from modeling_encodec.bitstream.compression import name_of
from modeling_encodec.models.batching_encodec import as_tensor, group_by_length, stack_chunks, stack_scales, to_device
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint, stream_fingerprint
from modeling_encodec.models.inputs_encodec import array_is_finite, audio_array, check_rate
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.precision_encodec import SharedSetting, call_with_threads, exact_float32, thread_count
from modeling_encodec.processors.audio import AudioReader, join_blocks, match_channels, resample
from modeling_encodec.processors.audio_files import segment_span
from modeling_encodec.processors.corpus.clips import UnusableClip, check_corpus_rate, resolve
from modeling_encodec.system.devices import find_device, move


MOST_DECODED_FRAMES = 1 << 16  # of all clips that are decoded together, padding counted


@dataclass(frozen=True)
class Tokens:
    """A clip's codes (K, F), of a model with chunks one chunk after the other; the chunks' loudness (N,) float32 if
    the model normalises; and its samples at the model's rate."""

    codes: np.ndarray
    scales: np.ndarray | None
    audio_length: int


class PortableCodec:
    """A codec as a value: it can be sent to any process, and is loaded there when first used.

    One from a folder or the Hub travels as that name, one in memory as its weights.

    Attributes:
        name (str): what files call the model.
        config (EncodecConfig): of the model.
        fingerprint (str): hash of all weights and settings that decide codes.
        codebooks (str): hash of the codebooks, which is what codes mean.
    """

    def __init__(self, model: str | Path | EncodecModel, precision: str = "exact"):
        """`model`: a folder, Hub id, or a model. `precision` as of `EncodecModel`.

        Raises:
            OSError: if there is no such model.
            ValueError: for an unknown precision.
        """
        if isinstance(model, EncodecModel):
            self._source = _packed(model)
        else:  # a folder by its whole path: another process may stand elsewhere
            self._source = str(Path(model).resolve() if Path(model).is_dir() else model)
        loaded = _load(self._source, precision, "cpu")
        self.name = name_of(model if isinstance(model, EncodecModel) else loaded)
        self.config, self.precision = loaded.config, precision
        self.fingerprint, self.codebooks = stream_fingerprint(loaded), codebook_fingerprint(loaded)
        self._loaded = {"cpu": loaded}

    def __getstate__(self) -> dict:
        # The configuration as text: equal codecs are then pickled to equal bytes, which caches go by.
        return self.__dict__ | {"_loaded": {}, "config": self.config.to_json_string(use_diff=False)}

    def __setstate__(self, state: dict) -> None:
        config = EncodecConfig.from_dict(json.loads(state["config"]))
        self.__dict__.update(state | {"config": config})

    def on(self, device: str) -> EncodecModel:
        """The model on this device, loaded once in each process.

        Raises:
            ValueError: if what lies under its name is no longer the same, or the device is none.
        """
        if device != "cpu":
            find_device(device)  # whatever is loaded: in a forked process no GPU is to be used
        if device not in self._loaded:
            loaded = _load(self._source, self.precision, device)
            if stream_fingerprint(loaded) != self.fingerprint:
                raise ValueError(f"model {self.name!r} has changed since it was opened, allowed: the same weights")
            self._loaded[device] = loaded
        return self._loaded[device]

    def count(self, bandwidth: float | None, num_quantizers: int | None) -> int:
        """Codebooks that `bandwidth` (kbps) or `num_quantizers` asks for.

        Raises:
            ValueError: for what the model has not, or if neither is given and the model has several bandwidths.
        """
        allowed = self.config.target_bandwidths
        if bandwidth is None and num_quantizers is None and len(allowed) > 1:
            raise ValueError(f"bandwidth is not given, allowed: one of {list(allowed)} kbps, or num_quantizers")
        return self.on("cpu").resolve_quantizers(bandwidth, num_quantizers)

    def provenance(self, num_quantizers: int) -> dict:
        """What tokens of so many codebooks are made with, as it is noted beside them."""
        config = self.config
        kbps = num_quantizers * config.codebook_nbits * config.sampling_rate / config.hop_length / 1000
        return {
            "model": self.name,
            "model_fingerprint": self.fingerprint,
            "codebook_fingerprint": self.codebooks,
            "num_quantizers": num_quantizers,
            "codebook_size": config.codebook_size,
            "bandwidth_kbps": round(kbps, 6),
            "sampling_rate": config.sampling_rate,
            "audio_channels": config.audio_channels,
            "hop_length": config.hop_length,
            "precision": self.precision,
        }

    @property
    def code_dtype(self) -> str:
        """What codes are kept as."""
        return code_dtype(self.config)


def code_dtype(config: EncodecConfig) -> str:
    """The smallest type that holds a model's codes."""
    return "uint16" if config.codebook_size <= 1 << 16 else "int32"


def process_device(device: str | None, number: int) -> str:
    """Of process `number` of a machine: `device`, of which "cuda" is its own of the GPUs; for None that, or the CPU
    where there are none."""
    if device not in (None, "cuda") or not torch.cuda.is_available():
        return device or "cpu"
    return f"cuda:{number % torch.cuda.device_count()}"


def one_thread(device: str) -> AbstractContextManager:
    """PyTorch computes with one thread meanwhile, if on a CPU."""
    return thread_count(1) if device == "cpu" else nullcontext()


# ---- clips to codes -----------------------------------------------------------------------------------------------


def open_clip(location, config: EncodecConfig) -> tuple[float, Iterator[np.ndarray]]:
    """How many seconds a clip lasts (infinitely many, if only decoding tells), and its audio in blocks (channels, T)
    as the model wants it.

    `location`: a path, encoded bytes, {"array", "sampling_rate"}, a `Segment` of one of these, or what gives any of
    them when called. The blocks raise a ValueError with the reason where there is no audio: damaged, empty, cut off,
    not finite, too many channels.

    Raises:
        ValueError: if there is no audio.
    """
    rate, channels = config.sampling_rate, config.audio_channels
    try:
        location, part = resolve(location)
        if isinstance(location, dict):
            audio = _array(location, rate, channels, **part)
            return audio.shape[1] / rate, iter([audio])
        source = BytesIO(location) if isinstance(location, bytes) else location
        reader = AudioReader(source, rate, channels, **part)
    except UnusableClip as error:
        raise ValueError(error.reason) from None
    except (ValueError, OSError) as error:
        raise ValueError(_reason(error, location)) from None
    try:
        check_corpus_rate(reader.rate)
    except ValueError:
        reader.file.close()
        raise
    return math.inf if reader.seconds is None else reader.seconds, _blocks(reader, location)


def read_clip(location, config: EncodecConfig) -> np.ndarray:
    """A clip's audio (channels, T) as the model wants it; see `open_clip`.

    Raises:
        ValueError: if there is none.
    """
    return join_blocks(open_clip(location, config)[1])


def encode_clips(model: EncodecModel, clips: Sequence[np.ndarray | torch.Tensor], num_quantizers: int) -> list[Tokens]:
    """Tokens of clips (channels, T) of any lengths, with so many codebooks; those of `model.encode` of each."""
    return begin_clips(model, clips, num_quantizers)()


def begin_clips(
    model: EncodecModel, clips: Sequence[np.ndarray | torch.Tensor], num_quantizers: int
) -> Callable[[], list[Tokens]]:
    """Begin `encode_clips`; what is returned gives the tokens. An accelerator computes meanwhile."""
    lengths = [clip.shape[1] for clip in clips]
    spans = [list(model.config.chunk_spans(length)) for length in lengths]
    audio = [to_device(as_tensor("audio", clip), model.device)[None] for clip in clips]
    pieces = [whole[..., start:stop] for whole, row in zip(audio, spans) for start, stop in row]

    def compute():
        with torch.no_grad(), exact_float32():
            return model.encode_pieces(pieces, num_quantizers)

    codes, scales = call_with_threads(1, compute) if model.device.type == "cpu" else compute()

    codes, scales = fetch(codes), fetch(scales)

    def finish() -> list[Tokens]:
        given = zip([piece[0] for piece in codes()], scales() or itertools.repeat(None))
        return [
            join_pieces(model.config, list(itertools.islice(given, len(row))), length)
            for length, row in zip(lengths, spans)
        ]

    return finish


def fetch(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """What gives tensors of one dtype and device on the CPU, by one transfer, which begins now: later it would wait
    for all that the device is given to do meanwhile."""
    if not tensors or tensors[0].device.type == "cpu":
        return lambda: list(tensors)
    sizes = [tensor.shape for tensor in tensors]
    flat, done = torch.cat([tensor.flatten() for tensor in tensors]), None
    if flat.device.type == "cuda" and torch.cuda.is_available():
        done, stream = torch.cuda.Event(), torch.cuda.current_stream(flat.device)
        flat = flat.to("cpu", non_blocking=True)  # into pinned memory
        done.record(stream)

    def wait() -> list[torch.Tensor]:
        if done is not None:
            done.synchronize()
        parts = flat.cpu().split([size.numel() for size in sizes])
        return [part.view(size) for part, size in zip(parts, sizes)]

    return wait


def join_pieces(config: EncodecConfig, pieces: Sequence[tuple], audio_length: int) -> Tokens:
    """Tokens of a clip of the codes (K, F) and scales of its pieces, in their order."""
    codes, scales = zip(*pieces)
    codes = torch.cat(codes, dim=1).cpu().numpy()
    if config.normalize and isinstance(scales[0], torch.Tensor):
        scales = torch.cat([scale.flatten() for scale in scales]).tolist()
    return Tokens(
        codes.astype(code_dtype(config)), np.array(scales, np.float32) if config.normalize else None, audio_length
    )


def _blocks(reader: AudioReader, location) -> Iterator[np.ndarray]:
    try:
        with reader:
            yield from reader
    except (ValueError, OSError) as error:
        raise ValueError(_reason(error, location)) from None


def _array(value: dict, rate: int, channels: int, offset=None, duration=None, embedded=True) -> np.ndarray:
    samples = audio_array("array", value.get("array"))
    if samples.ndim not in (1, 2) or 0 in samples.shape:
        raise ValueError(f"array has shape {samples.shape}, allowed: (samples,) or (channels, samples)")
    given = check_rate("sampling_rate", value.get("sampling_rate"))
    check_corpus_rate(given)
    samples = samples.reshape(-1, samples.shape[-1])
    if samples.shape[0] > 8 and samples.shape[0] > samples.shape[1]:
        raise ValueError(f"array has shape {samples.shape}, allowed: (channels, samples); it looks transposed")
    if not array_is_finite(samples):
        raise ValueError("holds samples that are NaN or infinite")
    if (offset, duration) != (None, None):
        first, count = segment_span(offset, duration, given, samples.shape[1], embedded=embedded)
        samples = samples[:, first : first + count]
    return resample(match_channels(samples, channels), given, rate)


def _reason(error: Exception, location) -> str:
    """What went wrong, without the place of the file."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    for name in (location if isinstance(location, str) else "", "the input"):
        text = text.removeprefix(f"{name}: ")
    return text


# ---- codes to audio -----------------------------------------------------------------------------------------------


def decode_tokens(model: EncodecModel, rows: Sequence[Tokens]) -> list[np.ndarray]:
    """Audio (channels, T) float32 of tokens; that of `model.decode` of each.

    Raises:
        ValueError: for tokens that are none of the model's.
    """
    return (
        call_with_threads(1, _decode_tokens, model, rows)
        if model.device.type == "cpu"
        else _decode_tokens(model, rows)
    )


@torch.no_grad()
def _decode_tokens(model: EncodecModel, rows: Sequence[Tokens]) -> list[np.ndarray]:
    lengths = [tokens.codes.shape[1] for tokens in rows]
    audio = [None] * len(rows)
    for group in group_by_length(lengths, MOST_DECODED_FRAMES):
        by_count = itertools.groupby(sorted(group, key=lambda i: len(rows[i].codes)), lambda i: len(rows[i].codes))
        for chosen in (list(places) for _, places in by_count):
            decoded = [row.float() for row in _decode(model, [rows[place] for place in chosen])]
            for place, row in zip(chosen, fetch(decoded)()):
                audio[place] = row.numpy()
    return audio


def _decode(model: EncodecModel, rows: list[Tokens]) -> list[torch.Tensor]:
    config, shape, codes, scales = model.config, [], [], []
    for tokens in rows:
        frames = [config.num_frames(stop - start) for start, stop in config.chunk_spans(tokens.audio_length)]
        if sum(frames) != tokens.codes.shape[1]:
            given = f"{tokens.codes.shape[1]} frames for {tokens.audio_length} samples"
            raise ValueError(f"codes have {given}, allowed: {sum(frames)}")
        shape.append(len(frames))
        codes += torch.from_numpy(tokens.codes.astype(np.int64))[None].split(frames, dim=2)
        if config.normalize:
            if tokens.scales is None or len(tokens.scales) != len(frames):
                given = None if tokens.scales is None else len(tokens.scales)
                raise ValueError(f"scales are {given}, allowed: {len(frames)}, one for each chunk")
            scales += [torch.tensor([[scale]], dtype=torch.float32, device="cpu") for scale in tokens.scales.tolist()]
    decoded = model.decode(
        to_device(stack_chunks(codes, shape), model.device),
        stack_scales(scales, shape) if config.normalize else None,
        codes_lengths=np.array([tokens.codes.shape[1] for tokens in rows]),
        audio_lengths=np.array([tokens.audio_length for tokens in rows]),
    )
    return decoded.rows()


# ---- the codec as a value -----------------------------------------------------------------------------------------


def _packed(model: EncodecModel) -> dict[str, bytes]:
    """The files of a model; modules with parametrised weights cannot be pickled."""
    with tempfile.TemporaryDirectory() as folder, _no_progress_bar.held():
        model.save_pretrained(folder, max_shard_size="1TB")
        return {name: (Path(folder) / name).read_bytes() for name in ("config.json", "model.safetensors")}


def _load(source: str | dict[str, bytes], precision: str, device: str) -> EncodecModel:
    with tempfile.TemporaryDirectory() as folder, _no_progress_bar.held(), torch.device("cpu"):
        if isinstance(source, dict):
            for name, data in source.items():
                (Path(folder) / name).write_bytes(data)
        model = EncodecModel.from_pretrained(source if isinstance(source, str) else folder)
    if isinstance(source, dict):
        model.config.name_or_path = ""  # not the folder's name, which is another each time
    model = move(model.eval(), torch.device(device))
    model.precision = precision
    return model


def _hide_progress_bar() -> Callable[[], None]:
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    return bars.enable_progress_bar if shown else lambda: None


_no_progress_bar = SharedSetting(_hide_progress_bar)
