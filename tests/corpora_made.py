"""The same five small clips as a folder, a manifest, Parquet, a tar and a dataset."""

import io
import json
import os
import tarfile

import datasets
import numpy as np
import pytest
import soundfile

from modeling_encodec.processors.corpus.clips import UnusableClip


NAMES = ["a/one.wav", "a-two.flac", "b.wav", "c.flac", "d.wav"]
TEXTS = ["eins", "zwei", "", "vier", "fünf"]


def encoded(number: int, suffix: str) -> bytes:
    """Noise, of one channel for even numbers and two for odd ones."""
    file = io.BytesIO()
    shape = (300 + 10 * number, 1 + number % 2)
    soundfile.write(file, np.random.default_rng(number).uniform(-1, 1, shape), 8000, format=suffix[1:].upper())
    return file.getvalue()


CLIPS = {name: encoded(number, os.path.splitext(name)[1]) for number, name in enumerate(NAMES)}


def write_folder(folder):
    for name, data in CLIPS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_manifest(folder, name="list.jsonl"):
    write_folder(folder)
    rows = [{"path": path, "text": text} for path, text in zip(NAMES, TEXTS)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def table(clips=CLIPS):
    audio = [{"bytes": data, "path": "clip.wav"} for data in clips.values()]
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["x", "y"]),
            "words": datasets.List({"word": datasets.Value("string"), "end": datasets.Value("float32")}),
        }
    )
    rows = range(len(clips))
    words = [[{"word": "w", "end": 0.5}] * row for row in rows]
    made = datasets.Dataset.from_dict(
        {"audio": audio, "text": TEXTS[: len(clips)], "label": [row % 2 for row in rows], "words": words}, features
    )
    return made.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())


def write_parquet(path):
    table().to_parquet(path)
    return path


def write_saved(folder):
    table().save_to_disk(folder)
    return folder


def write_tar(path, clips=CLIPS, more=lambda name: {"txt": b"text of " + name.encode()}):
    with tarfile.open(path, "w") as tar:
        for name, data in clips.items():
            key, suffix = os.path.splitext(name)
            for column, content in {suffix[1:]: data, **more(name)}.items():
                member = tarfile.TarInfo(f"{key}.{column}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def rows_of(source):
    return [row for shard in source.shards for row in shard.rows()]


def bytes_of(row) -> bytes:
    location = row.location() if callable(row.location) else row.location
    if isinstance(location, str):
        with open(location, "rb") as file:
            return file.read()
    return location


def reason(row) -> str:
    with pytest.raises(UnusableClip) as error:
        row.location()
    return error.value.reason
