"""Calls of every public function with a number, audio or codes left open, for `test_inputs`."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import clip

from modeling_encodec import (
    AudioReader,
    CodecDetokenizer,
    CodecTokenizer,
    CodeVocabulary,
    EcdcReader,
    EcdcWriter,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecLMConfig,
    EncodecProcessor,
    LMTrainingConfig,
    StreamingDecoder,
    StreamingEncoder,
    TrainingConfig,
    codebook_counts,
    compress,
    compress_blocks,
    compress_to_file,
    load_config,
    load_lm_config,
    plot_audio,
    plot_codebook_use,
    plot_codes,
    plot_training,
    read_audio,
    write_audio,
    write_audio_blocks,
)
from modeling_encodec.evaluation.clips import Clip, select_clips
from modeling_encodec.evaluation.metrics import mel_distance, si_snr, windowed_si_snr
from modeling_encodec.processors import code_layouts as layouts
from modeling_encodec.processors.audio import match_channels, resample


WHOLE_KINDS = {
    "np.int64": np.int64,
    "np.int32": np.int32,
    "np.uint16": np.uint16,
    "big-endian": lambda value: np.array([value], ">i8")[0],
    "array": np.array,
    "tensor": torch.tensor,
    "int16 tensor": lambda value: torch.tensor(value).to(torch.int16),
}
REAL_KINDS = {
    "int": lambda value: int(value) if value == int(value) else value,
    "np.float64": np.float64,
    "np.float32": np.float32,
    "array": lambda value: np.array(value, ">f4"),
    "tensor": torch.tensor,
    "float32 as a float": lambda value: float(np.float32(value)),
}
NO_NUMBERS = (True, np.True_, torch.tensor(True), float("nan"), "4", [4], np.array([4]), 4.5, 4j, b"4")
# Public names whose own arguments are no numbers, audio or codes: files, names, models, texts, records.
WITHOUT_NUMBERS = {
    *("CodecTrainer", "LMTrainer", "StreamState", "bundled_checkpoint", "bundled_lm_checkpoint", "convert_checkpoint"),
    *("decompress", "decompress_blocks", "decompress_from_file", "load_tokens", "plot_rate_distortion"),
    *("provenance_of", "push_folder", "read_codes", "read_log", "register_auto_classes", "save_figure"),
}


class Things:
    """What the calls below are made with."""

    def __init__(self, models, lms, folder: Path):
        self.model, self.chunked, self.lm, self.folder = models["24khz"], models["48khz"], lms["24khz"], folder
        self.audio = clip(self.model, 0.1)
        self.codes = self.model.encode(self.audio[None], num_quantizers=4).audio_codes
        self.row = self.codes[0, 0].numpy()
        self.tokens = CodecTokenizer(self.model, num_quantizers=4)
        self.extractor = EncodecFeatureExtractor.for_model(self.model.config)
        self.processor = EncodecProcessor.for_model(self.model, num_quantizers=4)
        self.wav = folder / "in.wav"
        soundfile.write(self.wav, self.audio[0].numpy(), 24000)

    def write(self, count, length=None) -> bytes:
        """A file of `count` codebooks."""
        file = io.BytesIO()
        writer = EcdcWriter(file, self.model, num_codebooks=count, model_name="m", file_id=count)
        writer.write(self.row)
        writer.close(self.audio.shape[1] if length is None else length)
        return file.getvalue()

    def vocabulary(self, **changed) -> list:
        """A vocabulary's fields and what it makes of codes."""
        made = CodeVocabulary(**({"codebook_size": 64, "num_quantizers": 4, "frame_rate": 75} | changed))
        return [dataclasses.asdict(made), made.encode(self.row)]

    def written(self, rate) -> bytes:
        """A WAV file."""
        file = io.BytesIO()
        write_audio(file, self.audio.numpy(), rate)
        return file.getvalue()

    def written_blocks(self, rate) -> bytes:
        """The same, block by block."""
        file = io.BytesIO()
        write_audio_blocks(file, [self.audio.numpy()], rate)
        return file.getvalue()

    def detokenized(self, length) -> list:
        """Audio of tokens whose length is given so."""
        columns = {"codes": [self.row], "audio_length": [length]}
        return CodecDetokenizer(self.model, form="array")(columns)["audio"][0]["array"]

    def compressed(self, **options) -> bytes:
        """A file, by whichever function takes these."""
        file = io.BytesIO()
        compress_to_file(self.model, self.audio, file, **options)
        return file.getvalue()

    def compressed_blocks(self, **options) -> bytes:
        """A file of two blocks."""
        file = io.BytesIO()
        compress_blocks(self.model, self.audio.split(1000, dim=1), file, **options)
        return file.getvalue()

    def compressed_of(self, blocks) -> bytes:
        """A file of these blocks of audio."""
        file = io.BytesIO()
        compress_blocks(self.model, blocks, file, 1.8)
        return file.getvalue()

    def written_of(self, audio) -> bytes:
        """A WAV file of this audio."""
        file = io.BytesIO()
        write_audio(file, audio, 24000)
        return file.getvalue()

    def write_of(self, codes) -> bytes:
        """A file of these codes."""
        file = io.BytesIO()
        writer = EcdcWriter(file, self.model, num_codebooks=4, model_name="m")
        writer.write(codes)
        writer.close(2400)
        return file.getvalue()


# Where a whole number goes: public name, what is called with it, the number.
WHOLE = [
    ("EncodecModel", "encode", lambda t, n: t.model.encode(t.audio[None], num_quantizers=n).audio_codes, 4),
    ("EncodecModel", "forward", lambda t, n: t.model(t.audio[None], num_quantizers=n).audio_codes, 4),
    ("EncodecModel", "decode", lambda t, n: t.model.decode(t.codes, last_frame_pad_length=n).audio_values, 3),
    ("EncodecModel", "quantize", lambda t, n: t.model.quantize(torch.ones(1, 16, 3), n), 4),
    ("EncodecModel", "resolve", lambda t, n: t.model.resolve_quantizers(None, n), 4),
    ("EncodecModel", "quantizer", lambda t, n: t.model.quantizer.encode(torch.ones(1, 16, 3), num_quantizers=n), 4),
    ("EncodecLM", "forward", lambda t, n: t.lm(t.codes[0], t.codes[0], position_offset=n).loss, 4),
    ("EncodecConfig", "num_frames", lambda t, n: t.model.config.num_frames(n), 641),
    ("EncodecConfig", "chunk_spans", lambda t, n: list(t.chunked.config.chunk_spans(n)), 30_000),
    ("EncodecConfig", "sizes", lambda t, n: EncodecConfig(num_filters=n, kernel_size=n).to_json_string(), 5),
    ("EncodecLMConfig", "sizes", lambda t, n: EncodecLMConfig(num_codebooks=n, codebook_size=n).to_json_string(), 5),
    ("StreamingEncoder", "rows", lambda t, n: StreamingEncoder(t.model, 1.8, batch_size=n).batch_size, 2),
    ("StreamingEncoder", "count", lambda t, n: StreamingEncoder(t.model, num_quantizers=n).push(t.audio), 4),
    ("StreamingEncoder", "reset", lambda t, n: StreamingEncoder(t.model, 1.8, batch_size=3).flush([n]), 2),
    ("StreamingDecoder", "rows", lambda t, n: StreamingDecoder(t.model, batch_size=n).lengths, 2),
    ("compress", "count", lambda t, n: compress(t.model, t.audio, num_quantizers=n), 4),
    ("compress_to_file", "version", lambda t, n: t.compressed(version=n), 1),
    ("compress_to_file", "count", lambda t, n: t.compressed(num_quantizers=n), 4),
    ("compress_blocks", "count", lambda t, n: t.compressed_blocks(num_quantizers=n), 4),
    ("compress_blocks", "length", lambda t, n: t.compressed_blocks(bandwidth=1.8, audio_length=n), 2400),
    ("EcdcWriter", "count", lambda t, n: t.write(n), 4),
    ("EcdcWriter", "length", lambda t, n: t.write(4, n), 2400),
    (
        "EcdcReader",
        "together",
        lambda t, n: len(list(EcdcReader(io.BytesIO(t.write(4))).read(t.model, together=n))),
        2,
    ),
    ("CodecTokenizer", "count", lambda t, n: CodecTokenizer(t.model, num_quantizers=n).num_quantizers, 4),
    ("CodecDetokenizer", "length", lambda t, n: t.detokenized(n), 2400),
    ("EncodecProcessor", "count", lambda t, n: EncodecProcessor.for_model(t.model, num_quantizers=n).vocab_size, 4),
    ("EncodecProcessor", "lengths", lambda t, n: t.processor(codes=[t.row], lengths=[n])["input_ids"], 5),
    ("CodeVocabulary", "codebook_size", lambda t, n: t.vocabulary(codebook_size=n), 64),
    ("CodeVocabulary", "num_quantizers", lambda t, n: t.vocabulary(num_quantizers=n), 4),
    ("CodeVocabulary", "pad_token_id", lambda t, n: t.vocabulary(pad_token_id=n), 500),
    ("CodeVocabulary", "pattern", lambda t, n: t.vocabulary(layout="delay", pattern=[0, n, n, n]), 2),
    ("CodeVocabulary", "for_model", lambda t, n: CodeVocabulary.for_model(t.model.config, n).vocab_size, 4),
    ("code_layouts", "offsets", lambda t, n: layouts.remove_offsets(layouts.add_offsets(t.row, n), n), 64),
    ("code_layouts", "unflatten", lambda t, n: layouts.unflatten(layouts.flatten(t.row), n), 4),
    ("code_layouts", "fill", lambda t, n: layouts.delay(t.row, fill=n), 4),
    ("code_layouts", "lengths", lambda t, n: layouts.flatten(t.row[None], lengths=[n], fill=9), 4),
    ("code_layouts", "pad_ids", lambda t, n: layouts.pad_ids([t.row[0], t.row[1, :3]], n)[0], 4),
    ("code_layouts", "bos", lambda t, n: layouts.add_bos_eos(t.row[0], n, eos_id=n), 4),
    ("EncodecFeatureExtractor", "channels", lambda t, n: EncodecFeatureExtractor(n).to_json_string(), 2),
    ("EncodecFeatureExtractor", "width", lambda t, n: t.extractor(t.audio, truncation=True, max_length=n), 4),
    ("AudioReader", "blocks", lambda t, n: [block.shape for block in AudioReader(t.wav, block_length=n)], 400),
    ("read_audio", "channels", lambda t, n: read_audio(t.wav, channels=n)[0], 2),
    ("match_channels", "channels", lambda t, n: match_channels(t.audio.numpy(), n), 2),
    ("plot_codes", "size", lambda t, n: plot_codes(t.row, n).axes[0].images[0].get_clim(), 64),
    ("plot_codebook_use", "count", lambda t, n: len(plot_codebook_use([[n, n], [n, n]]).axes), 4),
    ("codebook_counts", "size", lambda t, n: codebook_counts(t.row, n), 64),
    ("TrainingConfig", "batch_size", lambda t, n: repr(TrainingConfig(batch_size=n)), 4),
    ("LMTrainingConfig", "epochs", lambda t, n: repr(LMTrainingConfig(epochs=n)), 4),
    ("load_config", "batch_size", lambda t, n: repr(load_config("paper_24khz", batch_size=n)), 4),
    ("load_lm_config", "epochs", lambda t, n: repr(load_lm_config("paper", epochs=n)), 4),
    ("select_clips", "seed", lambda t, n: select_clips([Clip("a", "all", 1.0, "x")], most=n, seed=n), 4),
]
# Where a sampling rate goes: whole numbers, and 24000.0 too.
RATES = [
    ("EncodecFeatureExtractor", "own", lambda t, n: EncodecFeatureExtractor(1, n).to_json_string()),
    ("EncodecFeatureExtractor", "audio's", lambda t, n: t.extractor(t.audio, sampling_rate=n, return_tensors="np")),
    ("EncodecProcessor", "audio's", lambda t, n: t.processor(t.audio, n)["input_ids"]),
    ("CodecTokenizer", "row's", lambda t, n: row_codes(t, {"array": t.audio.numpy(), "sampling_rate": n})),
    ("AudioReader", "rate", lambda t, n: [block.shape for block in AudioReader(t.wav, n)]),
    ("read_audio", "rate", lambda t, n: read_audio(t.wav, n)),
    ("write_audio", "rate", lambda t, n: t.written(n)),
    ("write_audio_blocks", "rate", lambda t, n: t.written_blocks(n)),
    ("resample", "rates", lambda t, n: [resample(t.audio.numpy(), n, 16000), resample(t.audio.numpy(), 48000, n)]),
    ("plot_audio", "rate", lambda t, n: len(plot_audio({"a": {"b": t.audio[0].numpy()}}, n).axes)),
    ("mel_distance", "rate", lambda t, n: mel_distance(t.audio, 0.5 * t.audio, n)),
    ("windowed_si_snr", "rate", lambda t, n: windowed_si_snr(t.audio, 0.5 * t.audio + 0.1, n)),
]
# Where a real number goes.
REAL = [
    ("EncodecModel", "encode", lambda t, n: t.model.encode(t.audio[None], bandwidth=n).audio_codes, 1.8),
    ("EncodecModel", "forward", lambda t, n: t.model(t.audio[None], bandwidth=n).audio_codes, 1.8),
    ("EncodecModel", "quantizer", lambda t, n: t.model.quantizer.encode(torch.ones(1, 16, 3), n), 1.8),
    ("EncodecConfig", "kbps", lambda t, n: t.model.config.num_quantizers_for_bandwidth(n), 0.9),
    ("EncodecConfig", "chunks", lambda t, n: EncodecConfig(chunk_length_s=n, overlap=n / 4).chunk_stride, 1.0),
    ("EncodecConfig", "kbps", lambda t, n: EncodecConfig(target_bandwidths=[n, 2 * n]).num_quantizers, 1.5),
    ("EncodecLMConfig", "context", lambda t, n: EncodecLMConfig(context_seconds=n).context_frames, 2.0),
    ("StreamingEncoder", "kbps", lambda t, n: StreamingEncoder(t.model, n).push(t.audio), 3.6),
    ("compress", "kbps", lambda t, n: compress(t.model, t.audio, n), 1.8),
    ("compress", "seconds", lambda t, n: compress(t.model, t.audio, 1.8, segment_seconds=n), 1.0),
    ("compress_blocks", "kbps", lambda t, n: t.compressed_blocks(bandwidth=n, segment_seconds=n), 1.8),
    ("CodecTokenizer", "kbps", lambda t, n: CodecTokenizer(t.model, n, batch_seconds=n).num_quantizers, 1.8),
    ("EncodecProcessor", "kbps", lambda t, n: EncodecProcessor.for_model(t.model, n).vocab_size, 1.8),
    ("CodeVocabulary", "kbps", lambda t, n: CodeVocabulary.for_model(t.model.config, bandwidth=n).vocab_size, 1.8),
    ("CodeVocabulary", "rate", lambda t, n: t.vocabulary(frame_rate=n), 75.5),
    ("EncodecFeatureExtractor", "fill", lambda t, n: EncodecFeatureExtractor(padding_value=n).to_json_string(), 0.0),
    ("plot_codes", "rate", lambda t, n: plot_codes(t.row, 64, frame_rate=n).axes[0].get_xlim(), 75.0),
    ("TrainingConfig", "kbps", lambda t, n: TrainingConfig(bandwidths=[n]).bandwidths, 6.5),
    ("LMTrainingConfig", "seconds", lambda t, n: LMTrainingConfig(segment_seconds=n).segment_seconds, 2.0),
    ("plot_training", "value", lambda t, n: len(plot_training([{"update": 1, "train/mel": n}]).axes), 2.5),
    ("windowed_si_snr", "seconds", lambda t, n: windowed_si_snr(t.audio, 0.5 * t.audio + 0.1, 24000, n), 1.0),
]


def row_codes(t: Things, value) -> list:
    """A row's codes; what is said of it is an error."""
    columns = t.tokens({"audio": [value]})
    if columns["error"][0] is not None:
        raise ValueError(columns["error"][0])
    return columns["codes"][0]


def same(a, b) -> bool:
    """Equal values and types, whatever holds them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "keys"):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys())  # noqa: SIM118
    return type(a) is type(b) and a == b


def named(table: list) -> list:
    return [pytest.param(*row[2:], id=f"{row[0]}: {row[1]}") for row in table]


# ---- audio and codes ------------------------------------------------------------------------------------------------

AUDIO = [
    ("EncodecModel", "encode", lambda t, a: t.model.encode(a[None], bandwidth=1.8).audio_codes),
    ("StreamingEncoder", "push", lambda t, a: StreamingEncoder(t.model, 1.8).push(a[None])),
    ("compress", "audio", lambda t, a: compress(t.model, a, 1.8)),
    ("compress_blocks", "blocks", lambda t, a: t.compressed_of([a[:, :1000], a[:, 1000:]])),
    ("EncodecFeatureExtractor", "clip", lambda t, a: t.extractor(a, sampling_rate=24000, return_tensors="np")),
    ("EncodecProcessor", "audio", lambda t, a: t.processor(a, 24000)["input_ids"]),
    ("CodecTokenizer", "row", lambda t, a: row_codes(t, {"array": a, "sampling_rate": 24000})),
    ("write_audio", "audio", lambda t, a: t.written_of(a)),
    ("resample", "audio", lambda t, a: resample(a, 24000, 16000)),
    ("match_channels", "audio", lambda t, a: match_channels(a, 2)),
    ("plot_audio", "clip", lambda t, a: plot_audio({"c": {"a": a}}, 24000).axes[1].images[0].get_array().data),
    ("mel_distance", "both", lambda t, a: mel_distance(a, a, 24000)),
    ("si_snr", "reference", lambda t, a: si_snr(a, t.audio + 0.1)),
]
CODES = [
    ("EncodecModel", "decode", lambda t, c: t.model.decode(c[None, None]).audio_values),
    ("EncodecModel", "embed", lambda t, c: t.model.embed(c)),
    ("EncodecModel", "quantizer", lambda t, c: t.model.quantizer.decode(c[:, None])),
    ("EncodecLM", "forward", lambda t, c: t.lm(c[None], c[None]).loss),
    ("EncodecLM", "frequencies", lambda t, c: t.lm.frequencies(c[None])[0]),
    ("StreamingDecoder", "push", lambda t, c: StreamingDecoder(t.model).push(c[None])),
    ("CodecDetokenizer", "codes", lambda t, c: CodecDetokenizer(t.model, form="array")({"codes": [c]})["audio"]),
    ("EcdcWriter", "write", lambda t, c: t.write_of(c)),
    ("CodeVocabulary", "encode", lambda t, c: np.asarray(CodeVocabulary(64, 4, 75).encode(c))),
    ("EncodecProcessor", "codes", lambda t, c: t.processor(codes=c)["input_ids"]),
    ("code_layouts", "delay", lambda t, c: np.asarray(layouts.delay(c, fill=64))),
    ("plot_codes", "codes", lambda t, c: plot_codes(c, 64).axes[0].images[0].get_array().data),
    ("codebook_counts", "codes", lambda t, c: codebook_counts(c, 64)),
]
LAYOUTS = {
    "reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "every second": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "byte order": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "Fortran": lambda a: np.asfortranarray(a),
    "tensor": torch.from_numpy,
    "strided tensor": lambda a: torch.from_numpy(np.repeat(a, 2, -1))[..., ::2],
}
