"""Audio files to a tokenised dataset: `python -m modeling_encodec.training.code_corpus MANIFEST_OR_FOLDER TARGET`.

Codes are those of the codec's largest bandwidth, of which smaller ones use the first codebooks. All are in memory
until they are written, 9 MB for an hour of the bundled codec's.

    TARGET                        a folder of `save_to_disk`, a row for each file: codes (codebooks, frames), path
    TARGET/skipped_files.jsonl    files that could not be read, and why
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from modeling_encodec.atomic import atomic_folder
from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio
from modeling_encodec.training.code_sequences import encode_whole
from modeling_encodec.training.corpora import list_files
from modeling_encodec.training.options import require
from modeling_encodec.training.reporting import SKIPPED


def encode_files(files: list[Path], codec: EncodecModel, target: Path, processes: int = 1) -> list[tuple[Path, str]]:
    """Write the codes of `files` to the new folder `target`; returns those that could not be read, and why.

    Raises:
        FileExistsError: if there is a `target`.
        ValueError: if not one file can be read.
    """
    from datasets import Dataset, Features, List, Value

    require(processes >= 1, "processes", processes, "at least 1")
    if target.exists():
        raise FileExistsError(f"{target} exists, allowed: a new folder")
    results = list(zip(files, tqdm(_results(files, codec, processes), total=len(files), disable=None)))
    skipped = [(path, result) for path, result in results if isinstance(result, str)]
    rows = [{"codes": codes, "path": str(path)} for path, codes in results if not isinstance(codes, str)]
    if not rows:
        raise ValueError(f"none of {len(files)} files could be read {skipped[:1]}")
    kind = Value("int16" if codec.config.codebook_size <= 1 << 15 else "int32")
    dataset = Dataset.from_list(rows, Features({"codes": List(List(kind)), "path": Value("string")}))
    lines = [json.dumps({"file": str(path), "reason": reason}) + "\n" for path, reason in skipped]
    with atomic_folder(target) as new:
        dataset.save_to_disk(new)
        (new / SKIPPED).write_text("".join(lines))
    return skipped


def _results(files: list[Path], codec: EncodecModel, processes: int) -> Iterator[np.ndarray | str]:
    if processes == 1:
        yield from (_codes_of(codec, path) for path in files)
        return
    with tempfile.TemporaryDirectory() as folder:
        codec.save_pretrained(folder)  # modules with parametrised weights cannot be sent
        with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            yield from pool.map(partial(_codes_by_folder, folder), files, chunksize=4)


def _codes_of(codec: EncodecModel, path: Path) -> np.ndarray | str:
    """Codes (K, F) of a file, its chunks one after the other; or why it cannot be read."""
    config = codec.config
    try:
        audio, _ = read_audio(path, config.sampling_rate, config.audio_channels)
        codes = encode_whole(codec, torch.from_numpy(audio)[None])
    except (OSError, ValueError) as error:
        return str(error)
    return codes[0].cpu().numpy().astype(np.int16 if config.codebook_size <= 1 << 15 else np.int32)


_load = cache(lambda folder: EncodecModel.from_pretrained(folder).eval())


def _codes_by_folder(folder: str, path: Path) -> np.ndarray | str:
    return _codes_of(_load(folder), path)


def main(argv: list[str] | None = None) -> int:
    """The command; errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="code_corpus", description="Audio files to a dataset of a codec's codes.")
    parser.add_argument("source", metavar="MANIFEST_OR_FOLDER", help="The audio files.")
    parser.add_argument("target", type=Path, metavar="TARGET", help="New folder, in the form of save_to_disk.")
    parser.add_argument("--codec", default=str(bundled_checkpoint()), help="Folder or Hub id; default: the bundled.")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="Files encoded at the same time.")
    options = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    try:
        files = list_files(options.source)
        codec = EncodecModel.from_pretrained(options.codec).eval()
        skipped = encode_files(files, codec, options.target, options.processes)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"code_corpus: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for _, reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)
    print(f"{len(files) - len(skipped)} of {len(files)} files are in {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
