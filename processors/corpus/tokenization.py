"""A corpus of any size to tokens, by one process or many, on one machine or many, in constant memory.

A source is cut into shards, each of which becomes one Parquet file. What is in the file depends on the shard and the
settings alone, so shards can be made by any process, in any order, and a run that was killed goes on with those that
are missing and ends with the same bytes. Processes share the folder and nothing else: rank r of w makes the missing
shards r, r + w, ...; started by `torchrun` or `accelerate launch`, on as many machines as see the folder.
"""

import importlib.metadata
import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from modeling_encodec.models.batching_encodec import to_device
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio_ffmpeg import ffmpeg_version
from modeling_encodec.processors.audio_tokens import (
    PortableCodec,
    Tokens,
    begin_clips,
    encode_clips,
    join_pieces,
    one_thread,
    process_device,
)
from modeling_encodec.processors.corpus.checksums import MISSING, description_hash, find_shard_faults
from modeling_encodec.processors.corpus.loading import (
    Block,
    Clips,
    LoadingOptions,
    ShardEnd,
    Unusable,
    WindowEnd,
    default_workers,
    load_shards,
)
from modeling_encodec.processors.corpus.shards import (
    MOST_SHARDS,
    SUMMARY_FILES,
    ShardFile,
    shard_path,
    token_schema,
    write_summary,
)
from modeling_encodec.processors.corpus.sources import Shard, Source
from modeling_encodec.streaming.streams import StreamingEncoder, signal_pieces
from modeling_encodec.system.run_folder import Processes, join_processes, start_run


logger = logging.getLogger(__name__)

BLOCK_SECONDS = 10  # of a long clip that travel at a time, at least
PACKAGES = ("modeling-encodec", "torch", "numpy", "soxr")


@dataclass(frozen=True)
class Tokenization:
    """What is tokenised, with what, and where to.

    Attributes:
        source: the corpus.
        folder: for the output, see `shards`.
        codec: the model.
        num_quantizers: how many of its codebooks are used.
        split: what the dataset's split is called.
        batch_seconds: audio that is computed together on an accelerator, and that a clip has at most to be kept in
            memory whole.
        keep_broken: write what could be read of a shard that breaks off, and list the break; else it is no shard.

    Raises:
        ValueError: for a value that cannot be, or a source of too many shards.
    """

    source: Source
    folder: Path
    codec: PortableCodec
    num_quantizers: int
    split: str = "train"
    batch_seconds: float = 300.0
    keep_broken: bool = False

    def __post_init__(self):
        if not 1 <= self.batch_seconds < math.inf:
            raise ValueError(f"batch_seconds is {self.batch_seconds}, allowed: at least 1, and finite")
        if not self.split.isidentifier():
            raise ValueError(f"split is {self.split!r}, allowed: letters, digits and _")
        if len(self.source.shards) > MOST_SHARDS:
            shards = len(self.source.shards)
            raise ValueError(f"shards are {shards}, allowed: {MOST_SHARDS}; cut the source into larger ones")

    @property
    def schema(self):
        """The columns of the output."""
        return token_schema(self.codec.code_dtype, self.codec.config.normalize, self.source.kept)

    def describe(self) -> dict:
        """What decides the output, and nothing else: equal for equal runs. `keep_broken` is not in it: it decides of
        shards that would be missing, and a run may go on with it."""
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        return {
            "source": self.source.describe(),
            "provenance": self.codec.provenance(self.num_quantizers),
            "split": self.split,
            "columns": {field.name: str(field.type) for field in self.schema},
            "shards": len(self.source.shards),
            "batch_seconds": self.batch_seconds,
            "versions": versions | {"libsndfile": soundfile.__libsndfile_version__} | self._ffmpeg(),
        }

    def _ffmpeg(self) -> dict:
        return {"ffmpeg": ffmpeg_version()} if self.source.other.decoded else {}

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return shard_path(self.folder, self.split, shard, len(self.source.shards))


@dataclass(frozen=True)
class TokenizationReport:
    """The `manifest` of a complete output, and what this run did of it: hours of audio, in so many seconds, of which
    the first process's model `waited` so many for audio, not counting the start."""

    manifest: dict
    hours: float
    seconds: float
    waited: float


def tokenize_corpus(
    run: Tokenization,
    *,
    device: str | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> TokenizationReport | None:
    """Make every shard that is missing, all of them with `force`; a report on the first of several processes, when all
    have done theirs.

    Args:
        device: such as "cuda:1"; by default the GPU of this process's number on its machine, or the CPU.
        workers: processes that decode, for this one; 0 decodes in between. By default 0 on a CPU, else up to 8.
        force: make shards anew that are there, also over another run.
        progress: show a bar on stderr.

    Raises:
        FileExistsError: if the folder holds something else, or another run and `force` is not set.
        ValueError: if shards could not be read to their end; the others are there.
    """
    processes = join_processes()
    number, of = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    device = process_device(device, number)
    workers = default_workers(device, max(1, of)) if workers is None else workers
    maker = ShardMaker(run, device, workers)
    begun = time.monotonic()
    first = processes.number == 0
    with begin_output(run, force=force) if first else nullcontext():
        missing = _make_missing(run, maker, processes, shown=progress and first)
        return finish_output(run, missing, time.monotonic() - begun, maker.waited) if first else None


def _make_missing(run: Tokenization, maker: "ShardMaker", processes: Processes, *, shown: bool) -> list[int]:
    """Make all missing shards, this process its own; returns what was missing."""
    description = run.describe()
    if processes.from_first(description) != description:
        raise ValueError(f"process {processes.number} does not see what the first one sees, allowed: equal sources")
    # Of the first one: none begins before it knows, and a shared folder may show each something else.
    missing = processes.from_first(missing_shards(run, whole=False) if processes.number == 0 else [])
    there = sorted({shard.number for shard in run.source.shards} - set(missing))
    damaged = missing_shards(run, there[processes.number :: processes.count])
    missing = sorted(itertools.chain(missing, *processes.from_all(damaged)))
    mine = missing[processes.number :: processes.count]
    with _Progress(run, mine, processes.count, shown=shown) as bar:
        broken = maker.make([run.source.shards[shard] for shard in mine], bar)
    processes.wait()
    if broken:
        raise ValueError("; ".join(broken))
    return missing


def begin_output(run: Tokenization, *, force: bool) -> AbstractContextManager:
    """Make the output's folder, or go on in it; other runs are kept out until the end of what is returned."""
    return start_run(run.describe(), run.folder, "data", SUMMARY_FILES, force=force)


def missing_shards(run: Tokenization, numbers: Sequence[int] | None = None, *, whole: bool = True) -> list[int]:
    """Of these shards, by default all, the ones of which there is no whole file of this run. What is wrong with those
    that are there is logged. `whole`: read them to their end, not their footers alone."""
    numbers = range(len(run.source.shards)) if numbers is None else numbers
    digest = description_hash(run.describe())
    expected = {run.path(number): {"shard": number, "run": digest} for number in numbers}
    faults = dict(find_shard_faults(expected, whole=whole))
    for path, reason in faults.items():
        if reason != MISSING:
            logger.warning("%s: %s; it is made anew", path.name, reason)
    return [expected[path]["shard"] for path in faults]


def finish_output(run: Tokenization, made: Sequence[int], seconds: float, waited: float) -> TokenizationReport:
    """Sum up a complete output, of which these shards were made now, in so many seconds."""
    manifest = write_summary(run.folder, run.describe(), run.source.other.describe())
    samples = sum(manifest["files"][shard]["samples"] for shard in made)
    return TokenizationReport(manifest, samples / run.codec.config.sampling_rate / 3600, seconds, waited)


class ShardMaker:
    """Makes shards with one model on one device.

    Attributes:
        waited: seconds for which there was no audio to compute on, after the first of each `make`.
    """

    def __init__(self, run: Tokenization, device: str, workers: int):
        if workers < 0:
            raise ValueError(f"workers is {workers}, allowed: 0 or more")
        self.run, self.workers, self.waited = run, workers, 0.0
        self.model = run.codec.on(device)
        config = self.model.config
        unit = config.chunk_stride or self.model.block_frames * config.hop_length
        block = unit * -(-BLOCK_SECONDS * config.sampling_rate // unit)
        self.loading = LoadingOptions(config, run.batch_seconds, block)
        self.ahead = 0 if self.model.device.type == "cpu" else 1  # batches begun while one is waited for
        self._files: dict[int, ShardFile] = {}
        self._long: dict[int, _LongClip] = {}
        description = run.describe()
        self._about = {"run": description_hash(description), "provenance": description["provenance"]}

    def make(self, shards: Sequence[Shard], progress: "Count") -> list[str]:
        """Make these shards; returns what is to be said of those that could not be read to their end."""
        broken, ended = [], 0
        try:
            with one_thread(self.model.device.type), closing(load_shards(shards, self.loading, self.workers)) as items:
                for item, finish in self._begun(items):
                    file = self._file(item.shard)
                    if not isinstance(item, ShardEnd):
                        progress.heard(self._take(file, item, finish))
                        continue
                    broken += self._end(file, item)
                    del self._files[item.shard]
                    progress.made(item.shard, file)
                    ended += 1
            if ended != len(shards):
                raise RuntimeError(f"{len(shards)} shards were to be decoded, but {ended} arrived")
        finally:
            for file in self._files.values():
                file.discard()
            self._files, self._long = {}, {}
        return broken

    def _begun(self, items: Iterator) -> Iterator[tuple]:
        """Items, with what gives the tokens of clips, which an accelerator computes while the batch before is written
        and the next one arrives."""
        begun = deque()
        for item in self._timed(items):
            begun.append((item, self._begin(item) if isinstance(item, Clips) else None))
            if len(begun) > self.ahead:
                yield begun.popleft()
        yield from begun

    def _begin(self, item: Clips) -> Callable[[], list[Tokens]]:
        audio = to_device(torch.from_numpy(item.audio), self.model.device).split(item.lengths, dim=1)
        return begin_clips(self.model, audio, self.run.num_quantizers)

    def _timed(self, items: Iterator) -> Iterator:
        yield from itertools.islice(items, 1)
        while True:
            began = time.monotonic()
            item = next(items, None)
            self.waited += time.monotonic() - began
            if item is None:
                return
            yield item

    def _file(self, shard: int) -> ShardFile:
        if shard not in self._files:
            self._files[shard] = ShardFile(self.run.path(shard), self.run.schema)
        return self._files[shard]

    def _take(self, file: ShardFile, item: Clips | Block | Unusable | WindowEnd, finish: Callable | None) -> int:
        """Do what is to be done with `item`; returns how many samples it held."""
        if isinstance(item, Clips):
            for place, tokens in zip(item.places, finish()):
                file.add(place, tokens)
            return sum(item.lengths)
        if isinstance(item, Block):
            clip = self._long.setdefault(item.shard, _LongClip(self.model, self.run.num_quantizers))
            clip.push(to_device(torch.from_numpy(item.audio), self.model.device), item.last)
            if item.last:
                file.add(item.place, self._long.pop(item.shard).tokens())
            return item.audio.shape[1]
        if isinstance(item, Unusable):
            self._long.pop(item.shard, None)  # a long clip that breaks off
            file.skip(item.place, item.reason)
        else:
            file.close_window()
        return 0

    def _end(self, file: ShardFile, item: ShardEnd) -> list[str]:
        if item.broken is not None and not self.run.keep_broken:
            file.discard()
            return [f"shard {item.shard} breaks off ({item.broken}), allowed: whole shards, or keep_broken"]
        if item.broken is not None:
            file.skip(None, item.broken)
        file.finish(self._about | {"shard": item.shard}, item.rows, item.samples)
        return []


class _LongClip:
    """A clip that is coded block by block; as a whole, if its model needs that."""

    def __init__(self, model: EncodecModel, num_quantizers: int):
        self.model, self.num_quantizers, self.samples = model, num_quantizers, 0
        self.blocks, self.pieces = [], []
        whole = model.config.needs_whole_signal
        self.encoder = None if whole else StreamingEncoder(model, num_quantizers=num_quantizers)

    def push(self, audio: torch.Tensor, last: bool) -> None:
        """The next block (channels, T)."""
        self.samples += audio.shape[1]
        if self.encoder is None:
            self.blocks.append(audio)
        else:
            codes = (self.encoder.finish if last else self.encoder.push)(audio[None])
            self.pieces += [(codes.cpu(), scale) for codes, scale in signal_pieces(self.encoder, codes)]

    def tokens(self) -> Tokens:
        """Its tokens, after the last block."""
        if self.encoder is None:
            return encode_clips(self.model, [torch.cat(self.blocks, dim=1)], self.num_quantizers)[0]
        return join_pieces(self.model.config, self.pieces, self.samples)


class Count:
    """What has been made: samples, and skipped rows."""

    def __init__(self):
        self.samples = self.skipped = 0

    def heard(self, samples: int) -> None:
        """So many samples more."""
        self.samples += samples

    def made(self, shard: int, file: ShardFile) -> None:
        """A shard is done."""
        self.skipped += len(file.skipped)


class _Progress(Count):
    """How far this process is, and how fast, in hours of audio an hour."""

    def __init__(self, run: Tokenization, shards: Sequence[int], processes: int, *, shown: bool):
        super().__init__()
        self.sizes = {shard: max(1, run.source.shards[shard].size) for shard in shards}
        self.rate, self.processes = run.codec.config.sampling_rate, processes
        self.begun = time.monotonic()
        unit = run.source.unit
        self.bar = tqdm(total=sum(self.sizes.values()), unit=unit, unit_scale=unit == "B", disable=not shown)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def heard(self, samples: int) -> None:
        """So many samples more."""
        super().heard(samples)
        hours = self.samples / self.rate / 3600
        speed = hours * 3600 / max(1e-9, time.monotonic() - self.begun)
        each = f" x {self.processes}" if self.processes > 1 else ""
        told = f"{hours:.2f} h of audio, {speed:.1f} h/h{each}, {self.skipped} skipped"
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update(0)

    def made(self, shard: int, file: ShardFile) -> None:
        """A shard is done."""
        super().made(shard, file)
        self.bar.update(self.sizes[shard])
