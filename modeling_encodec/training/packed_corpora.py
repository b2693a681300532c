"""Corpora made small, to be carried to a machine without a network.

    python -m modeling_encodec.training.packed_corpora SOURCE ... DEST

    DEST/NAME/00000.opus ...    clips of the source NAME, in Opus (ffmpeg)
    DEST/NAME.jsonl             one line per clip: `path`, and the `source` it is of

Sources are manifests or folders, such as those of `debian_corpora`, whose manifests' names are kept, so that the same
recipe serves. Each source gets the same share of the bytes, or as much of it as it needs, and its clips are chosen by
a hash of their names. Opus at 64 kbps is 28.8 MB an hour.
"""

import argparse
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile

from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.audio_ffmpeg import ffmpeg_path
from modeling_encodec.processors.corpus.clips import UnusableClip, encoded_seconds, resolve
from modeling_encodec.processors.corpus.reading import list_recordings
from modeling_encodec.system.atomic import atomic_folder


FRAME_BYTES = 1000  # of a file besides its packets: headers, and pages of Ogg
AT_ONCE = 16  # clips encoded before it is looked at what they take


def pack(sources: Sequence[Path], dest: Path, *, megabytes: float, kbps: int = 64, seconds: float = 60.0) -> dict:
    """Write clips of the `sources`, each `seconds` long at most, as Opus at `kbps` into a new folder `dest`.

    Returns files and bytes of each source, by its name.

    Raises:
        ValueError: for sources of the same name or without audio, or numbers that cannot be.
        FileNotFoundError: without ffmpeg, or for a source that is not there.
        FileExistsError: if `dest` exists.
    """
    for name, value in (("megabytes", megabytes), ("kbps", kbps), ("seconds", seconds)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, allowed: a finite number above 0")
    if ffmpeg_path() is None:
        raise FileNotFoundError("ffmpeg: no such program, and clips are packed by it")
    if dest.exists():
        raise FileExistsError(f"{dest} exists, allowed: a new folder")
    names = [source.stem for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"sources are called {', '.join(names)}, allowed: a name of its own for each")
    clips = {source.stem: _estimated(source, kbps, seconds) for source in sources}
    shares = _shares({name: sum(size for *_, size in chosen) for name, chosen in clips.items()}, int(megabytes * 1e6))
    with atomic_folder(dest) as new:
        packed = {name: _pack_source(clips[name], new / name, shares[name], kbps, seconds) for name in names}
        for name, lines in packed.items():
            if not lines:
                raise ValueError(f"{name}: not one clip in {shares[name]} bytes, allowed: more megabytes, or audio")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (new / f"{name}.jsonl").write_text(text, encoding="utf-8")
    sizes = {name: [(dest / line["path"]).stat().st_size for line in lines] for name, lines in packed.items()}
    return {name: (len(found), sum(found)) for name, found in sizes.items()}


def _estimated(source: Path, kbps: int, seconds: float) -> list[tuple[str, object, int]]:
    """Name, location and about the bytes of each clip of a source, in the order of a hash of the names."""
    found = list_recordings(source)
    found.sort(key=lambda item: hashlib.sha256(Path(item[0]).name.encode("utf-8", "surrogateescape")).digest())
    rows = []
    for name, location in found:
        lasts = min(encoded_seconds(location), seconds)
        if lasts > 0:
            rows.append((name, location, FRAME_BYTES + int(lasts * kbps * 125)))
    return rows


def _shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    """Bytes of each source: an equal part of the total, and what smaller ones leave over."""
    shares, left = {}, total
    for number, (name, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        shares[name] = min(2 * size, left // (len(sizes) - number))  # sizes are estimates
        left -= min(size, shares[name])
    return shares


def _pack_source(clips: list, folder: Path, most: int, kbps: int, seconds: float) -> list[dict]:
    """Encode clips in their order until they take `most` bytes; what the manifest says of each."""
    lines, taken = [], 0
    folder.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, len(clips), AT_ONCE):
            part = clips[at : at + AT_ONCE]
            for (name, *_), data in zip(part, pool.map(lambda clip: _opus(clip[1], kbps, seconds), part)):
                if data is None:
                    continue
                if taken + len(data) > most:
                    return lines
                path = folder / f"{len(lines):05d}.opus"
                path.write_bytes(data)
                taken += len(data)
                lines.append({"path": f"{folder.name}/{path.name}", "source": Path(name).name})
    return lines


def _opus(location, kbps: int, seconds: float) -> bytes | None:
    """The clip as an Opus file; None if it is no audio."""
    try:
        place, part = resolve(location)
        audio, rate = read_audio(place, **part)
    except (OSError, ValueError, UnusableClip):
        return None
    wav = io.BytesIO()
    soundfile.write(wav, audio[:2, : int(seconds * rate)].T, rate, "FLOAT", format="WAV")
    command = [ffmpeg_path(), "-v", "error", "-i", "pipe:0", "-c:a", "libopus", "-b:a", f"{kbps}k", "-f", "opus", "-"]
    done = subprocess.run(command, input=wav.getvalue(), capture_output=True)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
        raise ValueError(f"ffmpeg: {words[-1]}")
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    """The command; errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="packed_corpora", description="Corpora as Opus within so many megabytes.")
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="Manifest or folder.")
    parser.add_argument("dest", type=Path, metavar="DEST", help="New folder.")
    parser.add_argument("--megabytes", type=float, default=40.0, help="Of all clips together, at most (40).")
    parser.add_argument("--kbps", type=int, default=64, help="Of Opus (64).")
    parser.add_argument("--seconds", type=float, default=60.0, help="Of a clip that are kept, at most (60).")
    options = parser.parse_args(argv)
    about = {"megabytes": options.megabytes, "kbps": options.kbps, "seconds": options.seconds}
    try:
        packed = pack(options.sources, options.dest, **about)
    except (ValueError, OSError) as error:
        print(f"packed_corpora: {error}", file=sys.stderr)
        return 2
    for name, (count, size) in packed.items():
        print(f"{name + '.jsonl':16} {size / 1e6:6.2f} MB, {count} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
