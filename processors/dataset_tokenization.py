"""Tokenising `datasets` datasets: callables for `map`, from audio to codes (`CodecTokenizer`) and back
(`CodecDetokenizer`).

    tokenizer = CodecTokenizer("facebook/encodec_24khz", bandwidth=6.0)
    tokens = tokenizer.map(dataset, num_proc=8)  # or dataset.map(tokenizer, batched=True, with_rank=True, ...)
    audio = CodecDetokenizer("facebook/encodec_24khz").map(tokens)

A row of audio becomes a row of tokens, one that gives no audio a row without codes and with the reason as its `error`;
`CodecTokenizer.map` takes such rows out and lists them. Audio is decoded by libsndfile and resampled by soxr, as
everywhere in the project; rows that others decoded (an array with its rate, torchcodec's decoder) are taken too.
"""

import copy
import functools
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np

from modeling_encodec.models.batching_encodec import group_by_length
from modeling_encodec.models.inputs_encodec import plain_array, real_number, whole_number
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import write_audio
from modeling_encodec.processors.audio_tokens import (
    PortableCodec,
    Tokens,
    begin_clips,
    decode_tokens,
    process_device,
    read_clip,
)
from modeling_encodec.processors.corpus.checksums import find_faults, read_manifest
from modeling_encodec.processors.corpus.reading import encoded_audio
from modeling_encodec.processors.corpus.segments import cut_location, segment_keys


logger = logging.getLogger(__name__)

PROVENANCE_MARK = "modeling-encodec tokens: "  # begins a line of a dataset's description
MOST_READERS = 8  # threads that decode a batch's audio for an accelerator
TOKEN_COLUMNS = ("codes", "frames", "audio_length", "scales", "error")


def import_datasets():
    """The `datasets` package.

    Raises:
        ImportError: with what to install.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError('tokenising datasets needs: pip install "modeling-encodec[datasets]"') from None
    return datasets


class _Mapped:
    """What both directions share: the codec, where it runs, and how a dataset is mapped."""

    def __init__(self, model: str | os.PathLike | EncodecModel, column: str, precision: str, device: str | None):
        self.codec = PortableCodec(os.fspath(model) if isinstance(model, os.PathLike) else model, precision)
        self.column, self.device = column, device

    def _model(self, rank: int | None) -> EncodecModel:
        return self.codec.on(process_device(self.device, rank or 0))

    def _check_dataset(self, dataset) -> None:
        datasets = import_datasets()
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise ValueError(f"dataset is a {type(dataset).__name__}, allowed: a dataset, or a dictionary of them")
        if dataset.column_names is not None and self.column not in dataset.column_names:
            raise ValueError(f"column is {self.column!r}, allowed: {', '.join(dataset.column_names)}")

    def _map(self, dataset, batch_size: int, num_proc: int | None, dropped: list[str], made, desc: str, options: dict):
        datasets = import_datasets()
        features = dataset.features
        if features is not None:
            options["features"] = datasets.Features({k: v for k, v in features.items() if k not in dropped} | made)
        options |= {"batched": True, "batch_size": batch_size, "remove_columns": dropped}
        if isinstance(dataset, datasets.Dataset):
            options = {"desc": desc} | options | {"with_rank": True, "num_proc": num_proc}
        elif num_proc is not None:
            raise ValueError(f"num_proc is {num_proc} of a stream, allowed: None (a DataLoader may have workers)")
        return dataset.with_format(None).map(self, **options)


class CodecTokenizer(_Mapped):
    """Rows of audio to rows of codes, in `datasets.map(batched=True)`, map-style and streaming.

    It can be pickled to any process, started in whatever way, and loads the model there, on the GPU of its rank where
    there are GPUs. Its pickle is the same for the same weights and settings: a second `map` finds the first one's
    cache.

    Columns it adds:
        codes: (codebooks, frames), uint16; of a model with chunks one chunk after the other. Empty where there is an
            `error`.
        frames, audio_length: the frames, and the samples at the model's rate.
        scales: (chunks,) float32, of models that normalise (48 kHz): needed to decode.
        error: why a row has no codes; else None.

    Examples:
        >>> import datasets, numpy as np
        >>> from modeling_encodec import CodecTokenizer, bundled_checkpoint
        >>> datasets.disable_progress_bars()
        >>> clip = {"array": np.zeros(24000, np.float32), "sampling_rate": 24000}
        >>> tokenizer = CodecTokenizer(bundled_checkpoint(), bandwidth=3.0)
        >>> row = tokenizer({"audio": [clip]})  # a batch, as `map` gives it
        >>> row["codes"][0].shape, row["frames"], row["audio_length"], row["error"]
        ((4, 75), [75], [24000], [None])
        >>> rows = datasets.Dataset.from_dict({"audio": [clip, {"array": [], "sampling_rate": 24000}], "id": [1, 2]})
        >>> tokens = tokenizer.map(rows)
        >>> tokens["id"][:], tokens["frames"][:]  # one row gives no audio
        ([1], [75])
    """

    def __init__(
        self,
        model: str | os.PathLike | EncodecModel,
        bandwidth: float | None = None,
        *,
        num_quantizers: int | None = None,
        column: str = "audio",
        precision: str = "exact",
        device: str | None = None,
        batch_seconds: float = 600.0,
    ):
        """Args:
            model: folder, Hub id, or a model.
            bandwidth: kbps, one of the model's.
            num_quantizers: codebooks, instead of `bandwidth`.
            column: of the audio.
            precision: `exact` or `fast`, see `EncodecModel`.
            device: such as "cuda:1"; by default the GPU of the process's rank, or the CPU.
            batch_seconds: audio that an accelerator computes together, at most, padding counted.

        Raises:
            ValueError: for a bandwidth the model has not, or none where it has several; for another precision.
            OSError: if there is no such model.
        """
        super().__init__(model, column, precision, device)
        self.batch_seconds = real_number("batch_seconds", batch_seconds, "above 0")
        if not self.batch_seconds > 0:
            raise ValueError(f"batch_seconds is {self.batch_seconds}, allowed: above 0")
        self.num_quantizers = self.codec.count(bandwidth, num_quantizers)

    @property
    def provenance(self) -> dict:
        """What the tokens are made with."""
        return self.codec.provenance(self.num_quantizers)

    @property
    def features(self):
        """The declared `datasets.Features` of the added columns; an ImportError without `datasets`."""
        datasets = import_datasets()
        kinds = {
            "codes": datasets.List(datasets.List(datasets.Value(self.codec.code_dtype))),
            "frames": datasets.Value("int32"),
            "audio_length": datasets.Value("int64"),
        }
        if self.codec.config.normalize:
            kinds["scales"] = datasets.List(datasets.Value("float32"))
        return datasets.Features(kinds | {"error": datasets.Value("string")})

    def __call__(self, batch: dict, rank: int | None = None) -> dict:
        """The added columns of a batch; `rank` is the number of the process."""
        keys, rows = [key for key in segment_keys(batch) if key != self.column], range(len(batch[self.column]))
        read = functools.partial(self._read, batch, keys)
        if process_device(self.device, rank or 0) == "cpu":  # where the model has the cores
            found = list(map(read, rows))
        else:
            with ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1)) as pool:
                found = list(pool.map(read, rows))
        clips, errors = ([pair[side] for pair in found] for side in (0, 1))
        for value, error in zip(batch[self.column], errors):
            if error is not None:
                logger.warning("skipped %s: %s", _location(value)[0], error)
        tokens = self._encode(clips, self._model(rank)) if any(clip is not None for clip in clips) else clips
        nothing = Tokens(np.zeros((0, 0), self.codec.code_dtype), np.zeros(0, np.float32), 0)
        rows = [nothing if row is None else row for row in tokens]
        columns = {
            "codes": [row.codes for row in rows],
            "frames": [row.codes.shape[1] for row in rows],
            "audio_length": [row.audio_length for row in rows],
        }
        if self.codec.config.normalize:
            columns["scales"] = [row.scales for row in rows]
        return columns | {"error": errors}

    def _read(self, batch: dict, keys: list[str], row: int) -> tuple[np.ndarray | None, str | None]:
        """A row's audio, or why there is none."""
        _, location = _location(batch[self.column][row])
        try:
            location = cut_location(location, {key: batch[key][row] for key in keys}, decoded=callable(location))
            return read_clip(location, self.codec.config), None
        except ValueError as error:
            return None, str(error)

    def _encode(self, clips: list, model: EncodecModel) -> list[Tokens | None]:
        tokens: list[Tokens | None] = [None] * len(clips)
        there = [place for place, clip in enumerate(clips) if clip is not None]
        most = int(self.batch_seconds * self.codec.config.sampling_rate)
        groups = group_by_length([clips[place].shape[1] for place in there], most)
        groups = [[there[index] for index in group] for group in groups]
        begun = [begin_clips(model, [clips[place] for place in group], self.num_quantizers) for group in groups]
        for group, finish in zip(groups, begun):
            for place, made in zip(group, finish()):
                tokens[place] = made
        return tokens

    def map(self, dataset, *, batch_size: int = 32, num_proc: int | None = None, **options):
        """The dataset with tokens in place of its audio; rows without audio are taken out.

        Other columns stay. What is skipped is logged, and of a stored dataset listed in
        `provenance_of(tokens)["skipped"]`.

        Args:
            dataset (Dataset, IterableDataset or a dictionary of them): of `datasets`.
            batch_size: rows that are decoded together.
            num_proc: processes; None for one, as a stream must have.
            **options (keyword arguments): go to `datasets.map`.

        Raises:
            ValueError: if not one row gives audio, or the dataset cannot be tokenised.
            ImportError: without `datasets`.
        """
        if isinstance(dataset, dict):
            made = {k: self.map(v, batch_size=batch_size, num_proc=num_proc, **options) for k, v in dataset.items()}
            return type(dataset)(made)
        self._check_dataset(dataset)
        datasets = import_datasets()
        names = dataset.column_names or []
        taken = sorted(set(names) & set(TOKEN_COLUMNS) - {self.column})
        if taken:
            raise ValueError(f"dataset has a column {taken[0]!r}, allowed: none of {', '.join(TOKEN_COLUMNS)}")
        features = dataset.features
        if features is not None and isinstance(features[self.column], datasets.Audio):
            dataset = dataset.cast_column(self.column, datasets.Audio(decode=False))
        mapped = self._map(dataset, batch_size, num_proc, [self.column], self.features, "tokenising", options)
        if isinstance(mapped, datasets.IterableDataset):
            return _described(
                mapped.filter(_has_codes, input_columns="error").remove_columns("error"), self.provenance
            )
        errors = mapped.with_format("arrow")["error"][:].to_pylist()
        skipped = [{"row": row, "reason": error} for row, error in enumerate(errors) if error is not None]
        if len(skipped) == len(errors) > 0:
            raise ValueError(f"none of {len(errors)} rows give audio, the first: {skipped[0]['reason']}")
        if skipped:
            logger.warning("%d of %d rows skipped, the first: %s", len(skipped), len(errors), skipped[0])
            mapped = mapped.filter(_has_codes, input_columns="error")
        return _described(mapped.remove_columns("error"), self.provenance | {"skipped": skipped})


class CodecDetokenizer(_Mapped):
    """Rows of codes, as `CodecTokenizer` makes them, to rows of audio.

    Columns it adds:
        audio: {"bytes", "path"} of WAV (16 bits), which `cast_column("audio", datasets.Audio())` plays; or, with
            `form="array"`, {"array" (channels, T) float32, "sampling_rate"}.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import CodecDetokenizer, CodecTokenizer, bundled_checkpoint
        >>> clip = {"array": np.zeros(24000, np.float32), "sampling_rate": 24000}
        >>> tokens = CodecTokenizer(bundled_checkpoint(), num_quantizers=4)({"audio": [clip]})
        >>> row = CodecDetokenizer(bundled_checkpoint(), form="array")(tokens)["audio"][0]
        >>> row["array"].shape, row["sampling_rate"]
        ((1, 24000), 24000)
    """

    def __init__(
        self,
        model: str | os.PathLike | EncodecModel,
        *,
        form: str = "wav",
        precision: str = "exact",
        device: str | None = None,
    ):
        """Args:
            model: folder, Hub id, or a model; its decoder may be another than that of the tokens.
            form: "wav" or "array".
            precision: as of `CodecTokenizer`.
            device: as of `CodecTokenizer`.

        Raises:
            ValueError: for another form or precision.
            OSError: if there is no such model.
        """
        super().__init__(model, "codes", precision, device)
        if form not in ("wav", "array"):
            raise ValueError(f"form is {form!r}, allowed: wav, array")
        self.form = form

    @property
    def features(self):
        """The declared `datasets.Features` of the added column; an ImportError without `datasets`."""
        datasets = import_datasets()
        if self.form == "array":
            samples = datasets.List(datasets.List(datasets.Value("float32")))
            return datasets.Features({"audio": {"array": samples, "sampling_rate": datasets.Value("int64")}})
        return datasets.Features({"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})

    def __call__(self, batch: dict, rank: int | None = None) -> dict:
        """The audio of a batch; `rank` is the number of the process.

        Raises:
            ValueError: for codes that are none of the model's.
        """
        config, rows = self.codec.config, []
        for row, codes in enumerate(batch["codes"]):
            try:
                codes = plain_array("codes", codes)
            except ValueError:
                raise ValueError(f"codes of row {row} are ragged, allowed: (codebooks, frames)") from None
            if codes.ndim != 2 or codes.dtype.kind not in "iu" or 0 in codes.shape:
                raise ValueError(f"codes are {codes.dtype} {codes.shape}, allowed: whole numbers (codebooks, frames)")
            length = batch["audio_length"][row] if "audio_length" in batch else codes.shape[1] * config.hop_length
            length = whole_number("audio_length", length, allowed="a whole number of samples")
            scales = plain_array("scales", batch["scales"][row]).astype(np.float32) if "scales" in batch else None
            rows.append(Tokens(codes, scales, length))
        rate = config.sampling_rate
        decoded = decode_tokens(self._model(rank), rows)
        if self.form == "array":
            return {"audio": [{"array": audio, "sampling_rate": rate} for audio in decoded]}
        return {"audio": [{"bytes": _wav(audio, rate), "path": None} for audio in decoded]}

    def map(self, dataset, *, batch_size: int = 32, num_proc: int | None = None, **options):
        """The dataset with audio in place of its tokens.

        Args:
            dataset (Dataset, IterableDataset or a dictionary of them): of `datasets`, with columns as of
                `CodecTokenizer`.
            batch_size: rows that are decoded together.
            num_proc: processes; None for one, as a stream must have.
            **options (keyword arguments): go to `datasets.map`.

        Raises:
            ValueError: for tokens of another codec.
            ImportError: without `datasets`.
        """
        if isinstance(dataset, dict):
            made = {k: self.map(v, batch_size=batch_size, num_proc=num_proc, **options) for k, v in dataset.items()}
            return type(dataset)(made)
        self._check_dataset(dataset)
        given = (provenance_of(dataset) or {}).get("codebook_fingerprint", self.codec.codebooks)
        if given != self.codec.codebooks:
            raise ValueError(f"tokens are of codebooks {given}, allowed: {self.codec.codebooks}, those of the model")
        names = dataset.column_names or list(next(iter(dataset), {}))
        dropped = [name for name in TOKEN_COLUMNS if name in names]
        return self._map(dataset, batch_size, num_proc, dropped, self.features, "decoding", options)


def provenance_of(dataset) -> dict | None:
    """What a dataset's tokens were made with.

    Args:
        dataset (Dataset or IterableDataset): of `datasets`.

    Returns:
        What `CodecTokenizer.map` and `load_tokens` noted: model, codebooks, fingerprints, and what was skipped; None
        if it is noted nowhere.

    Raises:
        ValueError: if the dataset is put together of tokens of several kinds.

    Examples:
        >>> import datasets, numpy as np
        >>> from modeling_encodec import CodecTokenizer, bundled_checkpoint, provenance_of
        >>> datasets.disable_progress_bars()
        >>> rows = datasets.Dataset.from_dict({"audio": [{"array": np.zeros(2400), "sampling_rate": 24000}]})
        >>> about = provenance_of(CodecTokenizer(bundled_checkpoint(), bandwidth=6.0).map(rows))
        >>> about["model"], about["num_quantizers"], about["bandwidth_kbps"], about["skipped"]
        ('encodec_24khz_c16', 8, 6.0, [])
        >>> print(provenance_of(rows))
        None
    """
    lines = [line for line in (dataset.info.description or "").splitlines() if line.startswith(PROVENANCE_MARK)]
    found = [json.loads(line.removeprefix(PROVENANCE_MARK)) for line in dict.fromkeys(lines)]
    skipped = [entry for notes in found for entry in notes.pop("skipped", [])]
    if any(notes != found[0] for notes in found):
        raise ValueError(f"the dataset holds tokens of {len(found)} kinds, allowed: of one: {found}")
    return found[0] | {"skipped": skipped} if found else None


def load_tokens(folder: str | os.PathLike, *, verify: bool | str = True, **options):
    """The dataset that `modeling-encodec tokenize` wrote, with its provenance.

    Args:
        folder: the command's output.
        verify: check what is read against its checksums: of a stored dataset all files at once, of a stream each row
            group when it is read. "all" checks all files at once of a stream too; False checks only that they are
            there, as long as they should be.
        **options (keyword arguments): go to `datasets.load_dataset`, such as `streaming` or `cache_dir`. A stream that
            is checked takes `columns` and `cache_dir`.

    Returns:
        (Dataset or IterableDataset): of `datasets`, the latter with `streaming=True`.

    Raises:
        FileNotFoundError: if it is none, or not complete.
        ValueError: if a file is damaged, or another run's; of a stream also while it is read.
        ImportError: without `datasets`.

    Examples:
        >>> import datasets, numpy as np
        >>> from pathlib import Path
        >>> from modeling_encodec import bundled_checkpoint, load_tokens, provenance_of, write_audio
        >>> from modeling_encodec.processors.audio_tokens import PortableCodec
        >>> from modeling_encodec.processors.corpus.sources import open_source
        >>> from modeling_encodec.processors.corpus.tokenization import Tokenization, tokenize_corpus
        >>> datasets.disable_progress_bars()
        >>> Path("clips").mkdir()
        >>> _ = write_audio("clips/one.wav", np.zeros((1, 24000)), 24000)
        >>> run = Tokenization(open_source("clips"), Path("tokens"), PortableCodec(bundled_checkpoint()), 4)
        >>> _ = tokenize_corpus(run, workers=0, progress=False)  # as the command does it
        >>> tokens = load_tokens("tokens", cache_dir="cache")
        >>> tokens["name"][:], np.array(tokens["codes"][0]).shape, provenance_of(tokens)["num_quantizers"]
        (['one.wav'], (4, 75), 4)
    """
    if verify not in (True, False, "all"):
        raise ValueError(f"verify is {verify!r}, allowed: True, False, 'all'")
    datasets, folder, about = import_datasets(), Path(folder), read_manifest(folder)
    for entry in about["files"]:
        file = folder / entry["file"]
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise FileNotFoundError(f"{file}: missing, or not of {entry['bytes']} bytes, as the manifest says")
    streaming = options.get("streaming", False)
    if verify:
        for name, reason in find_faults(folder, about, whole=verify == "all" or not streaming):
            raise ValueError(f"{folder / name}: {reason}; the tokenize command that made it mends it")
    if verify and streaming:
        dataset = _checked_stream(folder, about, options)
    else:
        dataset = datasets.load_dataset(str(folder), split=about["split"], **options)
    return _described(dataset, about["provenance"])


def _checked_stream(folder: Path, manifest: dict, options: dict):
    from modeling_encodec.processors.corpus.token_stream import TokenStream

    others = sorted(set(options) - {"streaming", "columns", "cache_dir"})
    if others:
        raise ValueError(
            f"{others[0]} is given for a stream that is checked, allowed: columns, cache_dir; or verify=False"
        )
    stream = TokenStream(folder.absolute(), manifest, options.get("columns"), cache_dir=options.get("cache_dir"))
    return stream.as_streaming_dataset(manifest["split"])


def _described(dataset, provenance: dict):
    """The dataset with this provenance in its description."""
    dataset = copy.copy(dataset)
    dataset._info = dataset._info.copy()
    before = [line for line in dataset._info.description.splitlines() if not line.startswith(PROVENANCE_MARK)]
    dataset._info.description = "\n".join([*before, PROVENANCE_MARK + json.dumps(provenance)])
    return dataset


def _has_codes(error: str | None) -> bool:
    return error is None


def _location(value) -> tuple[str, object]:
    """A row's name for messages, and its location as `open_clip` takes it."""
    if hasattr(value, "as_py"):  # of a dataset in Arrow's format
        value = value.as_py()
    if hasattr(value, "get_all_samples"):
        return "a row", functools.partial(_decoded, value)
    if isinstance(value, dict) and value.get("array") is not None:
        return value.get("path") or "a row", value
    return encoded_audio("a row", value)


def _decoded(decoder) -> dict:
    """What torchcodec's decoder gives."""
    try:
        samples = decoder.get_all_samples()
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return {"array": samples.data.numpy(), "sampling_rate": samples.sample_rate}


def _wav(audio: np.ndarray, rate: int) -> bytes:
    file = BytesIO()
    write_audio(file, audio, rate)
    return file.getvalue()
