"""Corpora decoded into memory before the first update, for training that would otherwise wait for its audio.

Crops are then the ones that would have been read, within float32 rounding, or to the bit where a clip has the model's
sampling rate already. Processes that read audio share the memory where they are forked (Linux).
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from modeling_encodec.processors.corpus.clips import Clip, UnusableClip, read_crop
from modeling_encodec.training.corpora import Corpus, StreamedCorpus


logger = logging.getLogger(__name__)

SPARE = 0.1  # part of the free memory that is left to the rest of the run
FLOAT = 4  # bytes
AT_ONCE = 256  # clips, so that an interrupt ends soon


def decode_corpora(corpora: Sequence[Corpus | StreamedCorpus], rate: int, channels: int, workers: int) -> None:
    """Decode all clips of `corpora` by all cores, at `rate` Hz with so many `channels`; of `workers`, processes that
    read audio, each needs a copy where processes are not forked.

    A clip that cannot be decoded stays as it was: it is told of when it is drawn.

    Raises:
        ValueError: for streams, and if there is not memory enough.
    """
    streams = [corpus.name for corpus in corpora if isinstance(corpus, StreamedCorpus)]
    if streams:
        raise ValueError(f"data_in_memory is True, allowed: no with streams, as corpus {streams[0]!r} is")
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    copies = processes * (1 if sys.platform == "linux" else 1 + workers)
    clips = [clip for corpus in corpora for clip in corpus.clips]
    needed = copies * FLOAT * channels * sum(clip.longest(rate) for clip in clips)
    free = int(free_memory() * (1 - SPARE))
    hours = sum(clip.seconds for clip in clips) / 3600
    if needed > free:
        raise ValueError(
            f"data_in_memory is True, allowed: no, for {hours:.1f} hours take {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB can be had"
        )
    logger.info("decoding %d clips, %.1f hours, into %.1f GB of memory", len(clips), hours, needed / 1e9)

    def decoded(clip: Clip) -> Clip:
        try:
            audio = read_crop(clip, 0, clip.longest(rate), rate, channels)
        except UnusableClip:
            return clip
        return dataclasses.replace(clip, decoded=audio)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // processes)) as pool:
        for corpus in corpora:
            parts = [corpus.clips[at : at + AT_ONCE] for at in range(0, len(corpus.clips), AT_ONCE)]
            corpus.clips = [clip for part in parts for clip in pool.map(decoded, part)]


def free_memory() -> int:
    """Bytes that this process can still take, by the system and by the limit of its container."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
