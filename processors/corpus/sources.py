"""What a corpus to be tokenised consists of: rows of audio, cut into shards that are read apart.

`open_source` lists a corpus without opening any audio; a shard reads its rows when they are asked for, in whatever
process, and pickles as its own part of the listing alone. Memory grows with the listing only: for a folder, the bytes
of its files' names.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from modeling_encodec.processors.audio_kinds import AUDIO_SUFFIXES
from modeling_encodec.processors.corpus.files import ARCHIVE_SUFFIXES, folder_source, manifest_source
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.processors.corpus.rows import Reach, Row, Shard, Source, refuse_options
from modeling_encodec.processors.corpus.tables import dataset_source, parquet_source, stored_source
from modeling_encodec.processors.corpus.tars import tar_source


__all__ = ["Row", "Shard", "Source", "open_source"]

MANIFEST_SUFFIXES = (".jsonl", ".csv", ".txt")


def open_source(
    source,
    *,
    keep: Sequence[str] = (),
    column: str | None = None,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool | None = None,
    shard_rows: int | None = None,
    shard_bytes: int | None = None,
    allow_urls: bool = False,
) -> Source:
    """List a corpus.

    Args:
        source (path, Hub id or dataset): a folder of audio; a manifest (.jsonl, .csv, .txt) of `path`s, and perhaps
            `offset` and `duration` in seconds; a .parquet or .tar
            (WebDataset) file, or a folder of such, one shard each; a folder of `save_to_disk`; a Hub id; or a
            `datasets` dataset. A stream has the shards that it has; its `take` and `skip` count in each of them, as
            `datasets` does it.
        keep: fields or columns to be taken along. Class labels become their text, members of a tar text; types of a
            manifest's fields are found over all its rows: int64, float64, bool, else string.
        column: which holds the audio; by default "audio", else the only one that can be it.
        split: of a dataset.
        subset: of a dataset of the Hub.
        revision: of a dataset of the Hub: a branch, tag or commit.
        streaming: read a dataset without loading it first; by default those of the Hub.
        shard_rows: most rows of a shard of files or of a stored dataset; by default a 64th of the corpus, within 16
            and 1024.
        shard_bytes: about so many bytes of files; by default a 64th of the corpus, within 8 and 256 MiB.
        allow_urls: open whatever URL a row of a table names; by default none but those of the Hub's dataset that
            `source` is.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it holds no audio, or an option does not fit it.
        ImportError: if `datasets` is needed and missing.
    """
    for name, value in (("shard_rows", shard_rows), ("shard_bytes", shard_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, allowed: at least 1")
    keep = tuple(dict.fromkeys([keep] if isinstance(keep, str) else keep))
    reach = Reach(("",) if allow_urls else ())
    given = {"subset": subset, "revision": revision, "streaming": streaming}
    if not isinstance(source, (str, os.PathLike)):
        _refuse_given(given, "the dataset", "is at hand")
        return dataset_source(source, "dataset", keep, column, shard_rows, reach=reach)
    path = Path(os.path.abspath(source))
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if saved or not path.exists():
        like_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source))
        if not saved and (not like_hub_id or path.suffix in (*ARCHIVE_SUFFIXES, *MANIFEST_SUFFIXES)):
            raise FileNotFoundError(f"{source}: no such folder, file or dataset")
        config = CorpusConfig(path.name if saved else str(source), str(source), "dataset", split=split, subset=subset)
        config.streaming = not saved if streaming is None else streaming
        return stored_source(config, keep, column, shard_rows, revision=revision, saved=saved, reach=reach)
    _refuse_given(given, source, "is no dataset")
    if path.is_dir():
        return _of_folder(path, keep, column, shard_rows, shard_bytes, reach)
    if path.suffix in ARCHIVE_SUFFIXES:
        return _of_archives(path.parent, [(path.name, path.stat())], path.name, keep, column, reach)
    if path.suffix in MANIFEST_SUFFIXES:
        return manifest_source(path, keep, column, shard_rows, shard_bytes)
    allowed = ", ".join((*ARCHIVE_SUFFIXES, *MANIFEST_SUFFIXES))
    raise ValueError(f"{source}: no corpus, allowed: a folder, a dataset, or {allowed}")


def _refuse_given(options: dict, source, why: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{source}: {name} is {value!r}, allowed: none, since it {why}")


def _of_folder(
    folder: Path,
    keep: tuple[str, ...],
    column: str | None,
    shard_rows: int | None,
    shard_bytes: int | None,
    reach: Reach,
) -> Source:
    source, archives = folder_source(folder, shard_rows, shard_bytes)
    kinds = {os.path.splitext(name)[1] for name, _ in archives} | ({"audio files"} if source.shards else set())
    if len(kinds) != 1:
        holds = " and ".join(sorted(kinds)) or "no corpus"
        allowed = ", ".join((*AUDIO_SUFFIXES, *ARCHIVE_SUFFIXES))
        there = "".join(f"; {line}" for line in source.other.lines())
        raise ValueError(f"{folder}: holds {holds}, allowed: audio ({allowed}) of one kind, or a saved dataset{there}")
    if archives:
        return replace(_of_archives(folder, archives, folder.name, keep, column, reach), other=source.other)
    refuse_options(folder, keep, column, [])
    return source


def _of_archives(
    folder: Path, files: list, name: str, keep: tuple[str, ...], column: str | None, reach: Reach
) -> Source:
    if files[0][0].endswith(".tar"):
        return tar_source(folder, files, name, keep, column)
    return parquet_source(folder, files, name, keep, column, reach)
