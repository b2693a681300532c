"""Tokens of a corpus on disk: Parquet files, each whole or absent, and what is told of them all at the end.

    OUT/run.json                           what is tokenised, and how; a run goes on only if that is the same
    OUT/data/train-00017-of-00123.parquet  tokens of shard 17; its metadata says what was skipped, and has checksums
    OUT/manifest.json                      made at the end: totals, provenance, every file and its checksum
    OUT/skipped.jsonl                      made at the end: rows without tokens, and why
    OUT/README.md                          made at the end: the dataset's card

`datasets.load_dataset(OUT)` reads the folder as it is.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pyarrow
from pyarrow import parquet

from modeling_encodec.processors.audio_tokens import Tokens
from modeling_encodec.processors.corpus.checksums import (
    BLANK,
    description_hash,
    hash_span,
    read_notes,
    seal,
    seal_shard,
)
from modeling_encodec.processors.corpus.loading import Place
from modeling_encodec.system.atomic import atomic_path


ROW_GROUP_FRAMES = 1 << 17  # half an hour at 75 frames a second: each group has a dictionary of codes of its own
METADATA_KEY = "modeling_encodec"
# The names of data files that `datasets` finds by itself have five digits; others it would leave out.
MOST_SHARDS = 99_999
SUMMARY_FILES = ("manifest.json", "skipped.jsonl", "README.md")
COLUMNS = ("name", "codes", "frames", "audio_length", "scales")


def token_schema(code_dtype: str, scales: bool, kept: dict[str, pyarrow.DataType]) -> pyarrow.Schema:
    """The columns of tokens, and of what is kept of a source's.

    Raises:
        ValueError: if one to be kept is called like one of the tokens'.
    """
    taken = sorted(set(kept) & set(COLUMNS))
    if taken:
        raise ValueError(f"kept column is {taken[0]!r}, allowed: other names than {', '.join(COLUMNS)}")
    code = getattr(pyarrow, code_dtype)()
    fields = {"name": pyarrow.string(), "codes": pyarrow.list_(pyarrow.list_(code))}
    fields |= {"frames": pyarrow.int32(), "audio_length": pyarrow.int64()}
    fields |= {"scales": pyarrow.list_(pyarrow.float32())} if scales else {}
    return pyarrow.schema(fields | kept)


def shard_path(folder: Path, split: str, number: int, shards: int) -> Path:
    """Where the tokens of a shard lie."""
    return folder / "data" / f"{split}-{number:05d}-of-{shards:05d}.parquet"


class ShardFile:
    """The file of a shard while it is made: rows of a window in any order, written in theirs."""

    def __init__(self, path: Path, schema: pyarrow.Schema):
        self.path, self.schema = path, schema
        self.skipped: list[dict] = []
        self.rows = self.samples = self.frames = 0
        self._window: list[tuple[Place, Tokens]] = []
        self._rows: list[tuple[Place, Tokens]] = []
        self._waiting = 0
        self._stack = ExitStack()
        self._row_groups: list[dict] = []
        # Not made before there is something to write: a process has one waiting for every worker.
        self._writer: parquet.ParquetWriter | None = None

    def add(self, place: Place, tokens: Tokens) -> None:
        """Tokens of a row of the window."""
        self._window.append((place, tokens))

    def skip(self, place: Place | None, reason: str) -> None:
        """A row, or without `place` the rest of the shard, without tokens."""
        name, row = (None, None) if place is None else (place.name, place.number)
        self.skipped.append({"row": row, "name": name, "reason": reason})

    def close_window(self) -> None:
        """All rows so far are there: write them, if that is worth it."""
        self._rows += sorted(self._window, key=lambda item: item[0].number)
        self._waiting += sum(tokens.codes.shape[1] for _, tokens in self._window)
        self._window = []
        if self._waiting >= ROW_GROUP_FRAMES:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self.rows += len(self._rows)
            self.samples += sum(tokens.audio_length for _, tokens in self._rows)
            self.frames += self._waiting
            self._open().write_table(self._table(self._rows))
            start, end = self._row_groups[-1]["end"] if self._row_groups else 0, self._sink.tell()
            with open(self._temporary, "rb") as file:
                self._row_groups.append({"end": end, "sha256": hash_span(file, start, end)})
        self._rows, self._waiting = [], 0

    def finish(self, about: dict, rows: int, samples: int) -> None:
        """The file is whole: it appears, with `about` and what was skipped in its metadata.

        Raises:
            RuntimeError: if it has not these `rows`, with the skipped ones, and `samples`, which were decoded for it.
        """
        self._write()
        arrived = self.rows + sum(entry["row"] is not None for entry in self.skipped)
        if (arrived, self.samples) != (rows, samples):
            raise RuntimeError(
                f"{self.path.name}: {rows} clips of {samples} samples were decoded, but {arrived} of {self.samples} "
                "arrived; it is not written, and the same command makes it anew"
            )
        writer = self._open()
        self.skipped.sort(key=lambda entry: (entry["row"] is None, entry["row"]))
        counts = {"rows": self.rows, "samples": self.samples, "frames": self.frames}
        notes = {"checksum": BLANK} | about | counts | {"skipped": self.skipped, "row_groups": self._row_groups}
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(notes)})
        writer.close()
        self._sink.close()
        seal_shard(self._temporary)
        self._stack.close()

    def discard(self) -> None:
        """No file appears."""
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            with suppress(InterruptedError), self._stack:
                raise InterruptedError

    def _open(self) -> parquet.ParquetWriter:
        if self._writer is None:
            self._temporary = self._stack.enter_context(atomic_path(self.path, durable=True))
            self._sink = pyarrow.OSFile(str(self._temporary), "wb")
            # Codes are spread evenly over a dictionary's 10 bits, so that nothing makes them smaller by more than a
            # hundredth: gzip as much as others, and its own CRC-32 tells every reader of flipped bits. Pages have
            # another beside, for readers that can be asked to look at it.
            self._writer = parquet.ParquetWriter(self._sink, self.schema, compression="gzip", write_page_checksum=True)
        return self._writer

    def _table(self, rows: list[tuple[Place, Tokens]]) -> pyarrow.Table:
        columns = {
            "name": [place.name for place, _ in rows],
            "codes": pyarrow.array([list(tokens.codes) for _, tokens in rows], self.schema.field("codes").type),
            "frames": [tokens.codes.shape[1] for _, tokens in rows],
            "audio_length": [tokens.audio_length for _, tokens in rows],
        }
        if "scales" in self.schema.names:
            columns["scales"] = [tokens.scales for _, tokens in rows]
        kept = {name: [place.kept.get(name) for place, _ in rows] for name in self.schema.names if name not in columns}
        return pyarrow.Table.from_pydict(columns | kept, schema=self.schema)


def write_summary(folder: Path, description: dict, other: dict) -> dict:
    """Write manifest, skipped rows and card of a complete run of this `description`, with the files of `other` kinds
    that its source holds; returns the manifest.

    Raises:
        ValueError: if a shard is missing, or there is not one row.
    """
    files, totals, skipped = [], dict.fromkeys(("rows", "skipped", "samples", "frames", "bytes"), 0), []
    with atomic_path(folder / "skipped.jsonl") as temporary, temporary.open("w", encoding="utf-8") as lines:
        for number in range(description["shards"]):
            path = shard_path(folder, description["split"], number, description["shards"])
            try:
                notes = read_notes(path)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}; the same command makes it anew") from None
            skipped += notes["skipped"][: not skipped]
            for entry in notes["skipped"]:
                lines.write(json.dumps({"shard": number} | entry, ensure_ascii=False) + "\n")
            counts = {name: notes[name] for name in ("rows", "samples", "frames", "bytes")}
            counts["skipped"] = len(notes["skipped"])
            files.append({"file": f"data/{path.name}"} | counts | {"checksum": notes["checksum"]})
            totals = {name: totals[name] + counts[name] for name in totals}
    if totals["rows"] == 0:
        first = f", the first: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"none of {totals['skipped']} clips gives audio{first}")
    provenance = description["provenance"]
    totals["hours"] = round(totals["samples"] / provenance["sampling_rate"] / 3600, 6)
    manifest = {"format": 1, "run": description_hash(description)} | description
    manifest |= {"totals": totals, "other_files": other}
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text("\n".join(_card(manifest)), encoding="utf-8")
    beside = ("run.json", "skipped.jsonl")  # and not the card, which is its owner's to change
    manifest["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in beside}
    manifest["files"] = files
    text = f'{{"checksum": "{BLANK}",{json.dumps(manifest, indent=1)[1:]}'
    with atomic_path(folder / "manifest.json", durable=True) as temporary:  # last: with it the folder is complete
        temporary.write_bytes(seal(text.encode()))
    return manifest


def _card(manifest: dict) -> Iterator[str]:
    provenance, totals = manifest["provenance"], manifest["totals"]
    # No `configs`: with them `datasets` takes its cache of another folder with an equal card for this one's.
    yield from ["---", "task_categories:", "- text-to-audio", "tags:", "- encodec", "- audio-tokens", "---", ""]
    yield from [f"# {manifest['source']['name']}, tokenised", ""]
    rate = provenance["sampling_rate"] / provenance["hop_length"]
    yield f"{totals['rows']} clips, {totals['hours']:.3f} hours, as codes of the neural audio codec EnCodec"
    books = f"{provenance['num_quantizers']} codebooks of {provenance['codebook_size']} codes"
    yield f"(`{provenance['model']}`): {books},"
    yield f"{rate:g} frames a second, {provenance['bandwidth_kbps']:g} kbps. {totals['skipped']} clips were skipped"
    yield "(`skipped.jsonl`). The audio's licence holds for its codes too."
    yield ""
    yield "| column | |"
    yield "|---|---|"
    yield "| name | of the clip in its source |"
    yield "| codes | (codebooks, frames), whole numbers; of a model with chunks one chunk after the other |"
    yield f"| frames, audio_length | frames, and samples at {provenance['sampling_rate']} Hz |"
    if "scales" in manifest["columns"]:
        yield "| scales | (chunks,) loudness, needed to decode |"
    others = [name for name in manifest["columns"] if name not in COLUMNS]
    if others:
        yield f"| {', '.join(others)} | as in the source |"
    yield from ["", "| made with | |", "|---|---|"]
    yield from (f"| {name} | {value} |" for name, value in provenance.items())
    yield ""
