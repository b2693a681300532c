"""Tokens beside tokens: of two runs, or of a run and its audio coded again."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from modeling_encodec.models.ties import first_apart, is_tie
from modeling_encodec.processors.audio_tokens import PortableCodec, Tokens, join_pieces, one_thread, read_clip
from modeling_encodec.processors.corpus.checksums import find_faults, read_manifest
from modeling_encodec.processors.corpus.sources import Source, open_source


TOKEN_COLUMNS = ("codes", "audio_length", "scales")


@dataclass(frozen=True)
class Apart:
    """A row whose tokens differ: the first frame and codebook, from 0 on, that do, None if only lengths or scales do;
    in how many frames, and whether each of those is a tie, None if that is not known."""

    name: str
    frame: int | None
    codebook: int | None
    frames: int
    tie: bool | None

    def line(self) -> str:
        """What is to be said of it."""
        if self.frame is None:
            return f"{self.name}: other lengths or scales"
        kind = {None: "", True: ", ties", False: ", no ties"}[self.tie]
        return f"{self.name}: first in frame {self.frame}, codebook {self.codebook}; {self.frames} frames in all{kind}"


@dataclass
class Agreement:
    """How far tokens agree.

    Attributes:
        rows: that were compared.
        frames: that were compared.
        equal: codes that are equal, of each codebook.
        apart: rows that differ.
        only: names of rows on one side only, for both sides.
        notes: what else differs.
    """

    rows: int = 0
    frames: int = 0
    equal: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    apart: list[Apart] = field(default_factory=list)
    only: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not (self.apart or self.only[0] or self.only[1] or self.notes)

    def add(self, name: str, ours: Tokens, theirs: Tokens, tie=None) -> None:
        """Count a row; `tie(frame)` tells whether a frame that differs is a tie."""
        books = min(len(ours.codes), len(theirs.codes))
        count = min(ours.codes.shape[1], theirs.codes.shape[1])
        same = ours.codes[:books, :count] == theirs.codes[:books, :count]
        equal = np.zeros(max(books, len(self.equal)), np.int64)
        equal[: len(self.equal)] += self.equal
        equal[:books] += same.sum(axis=1)
        self.equal, self.rows, self.frames = equal, self.rows + 1, self.frames + count
        frames = np.flatnonzero(~same.all(axis=0))
        if len(frames):
            first = int(frames[0])
            ties = None if tie is None else all(tie(int(frame)) for frame in frames)
            book = first_apart(*(torch.from_numpy(t.codes[:books, first].astype(np.int64)) for t in (ours, theirs)))
            self.apart.append(Apart(name, first, book, len(frames), ties))
        elif (ours.codes.shape, ours.audio_length) != (theirs.codes.shape, theirs.audio_length) or not np.array_equal(
            ours.scales, theirs.scales
        ):
            self.apart.append(Apart(name, None, None, 0, None))

    def lines(self, most: int = 20) -> Iterator[str]:
        """What is to be said, of rows that differ and are missing `most` each."""
        yield f"{self.rows} rows of {self.frames} frames compared, {self.rows - len(self.apart)} equal"
        for number, equal in enumerate(self.equal):
            yield f"codebook {number}: {equal} of {self.frames} codes equal, {equal / max(1, self.frames):.4%}"
        yield from self.notes
        lists = [("differs", [apart.line() for apart in self.apart])]
        lists += [(f"only in {side}", names) for side, names in zip(("A", "B"), self.only)]
        for title, entries in lists:
            yield from (f"{title}: {entry}" for entry in entries[:most])
            if len(entries) > most:
                yield f"{title}: {len(entries) - most} more"


class TokenFiles:
    """The rows of a finished output, read shard by shard.

    Raises:
        FileNotFoundError: if it is none.
        ValueError: if a file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        for name, reason in find_faults(folder, self.manifest):
            raise ValueError(f"{folder / name}: {reason}; the tokenize command that made it mends it")
        self.files = [folder / entry["file"] for entry in self.manifest["files"]]
        self._table = lru_cache(maxsize=2)(self._read)

    def names(self) -> dict[str, tuple[int, int]]:
        """Where each row is: number of its file, and of the row in it."""
        return {
            name: (file, row)
            for file, path in enumerate(self.files)
            for row, name in enumerate(parquet.read_table(path, columns=["name"])["name"].to_pylist())
        }

    def tokens(self, file: int, row: int) -> Tokens:
        """Those of a row."""
        table = self._table(file)
        lists = table["codes"][row].values
        codes = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)
        scales = np.array(table["scales"][row].as_py(), np.float32) if "scales" in table.column_names else None
        return Tokens(codes, scales, table["audio_length"][row].as_py())

    def _read(self, file: int) -> pyarrow.Table:
        columns = [name for name in TOKEN_COLUMNS if name in self.manifest["columns"]]
        return parquet.read_table(self.files[file], columns=columns).combine_chunks()


def compare_outputs(a: Path, b: Path) -> Agreement:
    """The tokens of two finished outputs, by the rows' names.

    Raises:
        FileNotFoundError: if one is none.
        ValueError: if a file is damaged.
    """
    left, right = TokenFiles(Path(a)), TokenFiles(Path(b))
    ours, theirs = left.names(), right.names()
    found = Agreement()
    found.only[0].extend(name for name in ours if name not in theirs)
    found.only[1].extend(name for name in theirs if name not in ours)
    one, other = left.manifest["provenance"], right.manifest["provenance"]
    for key in ("codebook_fingerprint", "num_quantizers", "sampling_rate"):
        if one[key] != other[key]:
            found.notes.append(f"{key}: {one[key]} in A, {other[key]} in B")
    for name, place in ours.items():
        if name in theirs:
            found.add(name, left.tokens(*place), right.tokens(*theirs[name]))
    return found


# ---- audio coded again ---------------------------------------------------------------------------------------------


def open_again(source, manifest: dict, *, allow_urls: bool = False) -> Source:
    """The corpus that tokens were made of, cut as it was then; see `open_source`."""
    about = manifest["source"]
    options = {name: about.get(name) for name in ("column", "shard_rows", "shard_bytes", "subset")}
    options = {name: value for name, value in options.items() if value is not None}
    if about["kind"] not in ("folder", "manifest"):
        options["split"] = manifest["split"]
    return open_source(source, keep=about.get("keep", ()), allow_urls=allow_urls, **options)


def code_again(
    files: TokenFiles, source: Source, codec: PortableCodec, share: float, seed: int, device="cpu"
) -> Agreement:
    """A random `share` of the rows of an output, at least one, beside their audio coded again.

    Raises:
        ValueError: if the model is another, or the audio of a row is not there or gives none.
    """
    provenance = files.manifest["provenance"]
    if codec.fingerprint != provenance["model_fingerprint"]:
        given = f"{codec.name}, with weights {codec.fingerprint}"
        raise ValueError(f"model is {given}, allowed: {provenance['model']}, {provenance['model_fingerprint']}")
    if len(source.shards) != len(files.files):
        raise ValueError(f"source has {len(source.shards)} shards, allowed: {len(files.files)}, those of the tokens")
    names = list(files.names().items())
    chosen = random.Random(seed).sample(names, max(1, round(share * len(names))))
    wanted: dict[int, dict[str, int]] = {}
    for name, (file, row) in chosen:
        wanted.setdefault(file, {})[name] = row
    model, found = codec.on(device), Agreement()
    for file, rows in sorted(wanted.items()):
        for row in source.shards[file].rows():
            if row.name in rows:
                _code_row(found, model, files.tokens(file, rows.pop(row.name)), row)
            if not rows:
                break
        found.only[0].extend(rows)
    return found


@torch.no_grad()
def _code_row(found: Agreement, model, stored: Tokens, row) -> None:
    try:
        audio = torch.from_numpy(read_clip(row.location, model.config)).to(model.device)
    except ValueError as error:
        found.notes.append(f"{row.name}: its audio gives no tokens now ({error})")
        return
    config, spans = model.config, list(model.config.chunk_spans(audio.shape[1]))
    with one_thread(model.device.type):
        output = model.encode(audio[None], num_quantizers=len(stored.codes), return_latents=True)
    frames = [config.num_frames(stop - start) for start, stop in spans]
    codes = [chunk[0, :, :count] for chunk, count in zip(output.audio_codes, frames)]
    coded = join_pieces(config, list(zip(codes, output.audio_scales)), audio.shape[1])
    latents = torch.cat([chunk[0, :, :count].float() for chunk, count in zip(output.latents, frames)], dim=1)

    def tie(frame: int) -> bool:
        sides = (torch.from_numpy(tokens.codes[:, frame].astype(np.int64)) for tokens in (coded, stored))
        return is_tie(model, latents[:, frame], *sides)

    found.add(row.name, stored, coded, tie)
