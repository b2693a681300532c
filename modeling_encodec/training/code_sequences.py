"""Training sequences for the language model: crops of tokenised recordings, by number.

As in `mixing`, everything about example number i follows from the seed and i: batches are the same for any number of
reading processes, and a run goes on where it stopped without a state of its data.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import IGNORED
from modeling_encodec.processors.corpus.checksums import find_faults, read_manifest
from modeling_encodec.training.options import require


ROW_ATTEMPTS = 100


class CodeSequences(Dataset):
    """Endless examples by number: {"codes": (K, F) int64, "skipped": [(row, reason), ...]}.

    A recording is drawn by its length and a sequence anywhere in it, so every second counts alike; recordings that
    are shorter than a sequence are followed by -100.
    """

    def __init__(self, places: list[str], column: str, *, codebooks: int, size: int, frames: int, seed: int):
        """`places` are tokenised datasets, `codebooks` and `size` the codec's; sequences have `frames` frames.

        Raises:
            ValueError: for datasets without such a column, or without codes in it.
        """
        self.places, self.codebooks, self.size, self.frames, self.seed = places, codebooks, size, frames, seed
        self.datasets = [open_codes(place, column) for place in places]
        lengths = [_row_lengths(dataset, place) for dataset, place in zip(self.datasets, places)]
        self.first_rows = np.cumsum([0, *map(len, lengths)])
        self.lengths = np.concatenate(lengths)
        self.ends = np.cumsum(self.lengths)
        require(self.lengths.any(), "codes", places, "datasets with frames of codes")

    @property
    def digest(self) -> str:
        """Changes with the rows' lengths and the sources' fingerprints."""
        text = repr([dataset._fingerprint for dataset in self.datasets]).encode()
        return f"{zlib.crc32(self.lengths.tobytes(), zlib.crc32(text)):08x}"

    def __getitem__(self, index: int) -> dict:
        """Example number `index`, from 0 on without end.

        Raises:
            RuntimeError: if a hundred rows in a row are none of the codec's.
        """
        rng = np.random.default_rng([self.seed, index])
        skipped = []
        while len(skipped) < ROW_ATTEMPTS:
            row = int(np.searchsorted(self.ends, rng.integers(self.ends[-1]), side="right"))
            start = int(rng.integers(max(1, self.lengths[row] - self.frames + 1)))
            try:
                codes = self._read(row)[:, start : start + self.frames]
            except ValueError as error:
                skipped.append((self._name(row), str(error)))
                continue
            padded = np.full((self.codebooks, self.frames), IGNORED, dtype=np.int64)
            padded[:, : codes.shape[1]] = codes
            return {"codes": torch.from_numpy(padded), "skipped": skipped}
        raise RuntimeError(f"{len(skipped)} rows of one example could not be used, the last: {skipped[-1]}")

    def recording(self, number: int) -> torch.Tensor:
        """The codes (K, F) of row `number` of all; a ValueError for a row that holds none of the codec's."""
        return torch.from_numpy(self._read(number))

    def __len__(self) -> int:
        return len(self.lengths)

    def _read(self, row: int) -> np.ndarray:
        place = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        codes = self.datasets[place][row - int(self.first_rows[place])]["codes"]
        codes = np.asarray(codes)
        if codes.ndim != 2 or len(codes) < self.codebooks or codes.dtype.kind not in "iu":
            shape = f"{codes.dtype} {codes.shape}"
            raise ValueError(f"codes are {shape}, allowed: at least {self.codebooks} rows of whole numbers, as long")
        codes = codes[: self.codebooks].astype(np.int64)
        if codes.min() < 0 or codes.max() >= self.size:
            raise ValueError(f"codes range from {codes.min()} to {codes.max()}, allowed: 0 to {self.size - 1}")
        return codes

    def _name(self, row: int) -> str:
        place = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return f"{self.places[place]} row {row - int(self.first_rows[place])}"


@torch.no_grad()
def encode_whole(codec: EncodecModel, audio: torch.Tensor) -> torch.Tensor:
    """Codes (B, K, F), of all codebooks, of audio (B, channels, T): its chunks one after the other."""
    config = codec.config
    coded = codec.encode(audio.to(codec.device), num_quantizers=config.num_quantizers)
    spans = config.chunk_spans(audio.shape[2])
    chunks = [chunk[..., : config.num_frames(stop - start)] for chunk, (start, stop) in zip(coded.audio_codes, spans)]
    return torch.cat(chunks, dim=2)


def open_codes(place: str | os.PathLike, column: str):
    """The tokenised dataset at `place`, its column of codes alone and called "codes".

    `place` is a folder that `tokenize` finished, whose checksums are checked, or one of `save_to_disk`, a .parquet,
    .jsonl, .json or .arrow file, or a Hub id.

    Raises:
        FileNotFoundError: for a whole path that is not there.
        ValueError: if it has no such column, no rows, is damaged, or a file of another kind.
        ImportError: without `datasets`.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError('tokenised datasets need datasets: pip install "modeling-encodec[train]"') from None
    path = Path(place)
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
    if path.is_absolute() and not path.exists():
        raise FileNotFoundError(f"{place}: no such dataset of codes")
    if (path / "state.json").exists():
        try:
            dataset = datasets.load_from_disk(str(path))
        except IndexError:  # what it makes of a file without a batch of rows
            raise ValueError(f"codes is {str(place)!r}, allowed: a dataset with rows") from None
    elif path.is_file():
        require(path.suffix in kinds, "codes", str(place), f"a folder, Hub id, or a file: {', '.join(kinds)}")
        dataset = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    elif (path / "manifest.json").is_file():
        manifest = read_manifest(path)
        for name, reason in find_faults(path, manifest):
            raise ValueError(f"{path / name}: {reason}; the tokenize command that made it mends it")
        dataset = datasets.load_dataset(str(place), split=manifest["split"])
    else:
        dataset = datasets.load_dataset(str(place), split="train")
    require(column in dataset.column_names, "codes_column", column, f"one of {', '.join(dataset.column_names)}")
    dataset = dataset.select_columns([column])
    dataset = dataset if column == "codes" else dataset.rename_column(column, "codes")
    return dataset.with_format("numpy")


def _row_lengths(dataset, place: str) -> np.ndarray:
    """Frames of every row, read without the codes themselves where the storage allows it."""
    import pyarrow
    from pyarrow import compute

    lengths = []
    for chunk in dataset.with_format("arrow").iter(batch_size=1000):
        codes = chunk["codes"].combine_chunks()
        if not (_is_list(pyarrow, codes.type) and _is_list(pyarrow, codes.type.value_type)):
            raise ValueError(f"codes of {place} are {codes.type}, allowed: lists of lists of whole numbers")
        # An empty row has no first list.
        rows = [None if count in (None, 0) else 0 for count in compute.list_value_length(codes).to_pylist()]
        filled = compute.list_value_length(compute.list_element(codes.filter([r is not None for r in rows]), 0))
        values = iter(filled.to_pylist())
        lengths += [0 if row is None else next(values) or 0 for row in rows]
    return np.array(lengths, dtype=np.int64)


def _is_list(pyarrow, kind) -> bool:
    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
