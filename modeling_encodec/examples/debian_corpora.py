"""Free audio for training, from Debian's own packages: `python -m modeling_encodec.examples.debian_corpora DEST`.

Debian ships recorded speech, spoken words, music and game sounds under free licences, and any Debian machine can fetch
them with its own `apt-get`. That is far less than the paper's data (arXiv 2210.13438, table A.1), but it needs no
account. Beside apt-get it takes dpkg-deb and, for G.722, ffmpeg.

    DEST/audio/PACKAGE/PATH_IN_PACKAGE.flac   the audio: mono for rates up to 24 kHz, else mono or stereo as it was
    DEST/train.jsonl, held_out.jsonl          one line per file; 7 % are held out, by a hash of the path in the package
    DEST/speech.jsonl, words.jsonl, ...       the training files of one kind, for recipes that weigh the kinds
    DEST/skipped.jsonl                        files that are no audio, empty, silent, too short or there twice, and why
    DEST/licences/PACKAGE, packages.json      copyright files; version, licences, files and hours of each package
    DEST/records/PACKAGE.json                 what is known of a complete package, so that a second run keeps it
"""

import argparse
import functools
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile

from modeling_encodec.processors.audio import match_channels, read_audio, resample, write_audio
from modeling_encodec.processors.audio_kinds import SNDFILE_SUFFIXES
from modeling_encodec.system.atomic import atomic_path


logger = logging.getLogger(__name__)

# Kind of a package's files: that of the first text here which their path contains.
PACKAGES = {
    **{f"asterisk-core-sounds-{language}-g722": {"": "speech"} for language in ("en", "es", "fr", "it", "ru")},
    "fillets-ng-data-cs": {"/cs/": "speech", "": "sounds"},  # dialogues of a game
    "fillets-ng-data-nl": {"/nl/": "speech", "": "sounds"},
    "klettres-data": {"": "words"},
    "tuxpaint-stamps-default": {"_desc": "words", "/symbols/": "words", "": "sounds"},
    "hedgewars-data": {"/voices/": "words", "/Music/": "music", "": "sounds"},
    "sonic-pi-samples": {"/loop_": "music", "": "sounds"},
    "lincity-ng-data": {"/music/": "music", "": "sounds"},
    "hyperrogue-music": {"/music/": "music", "": "sounds"},
    "wesnoth-1.16-music": {"": "music"},
    "singularity-music": {"": "music"},
    "drascula-music": {"": "music"},
    "festvox-ru": {"": "speech"},
    "pocketsphinx-testdata": {"": "speech"},
    "ktuberling-data": {"": "words"},
    "gcin-voice": {"": "words"},
    "warzone2100-music": {"": "music"},
    "planetblupi-music-ogg": {"": "music"},
    "colobot-common-sounds": {"/music/": "music", "": "sounds"},
}
# Packages that came later: nothing of them is held out, so that what is held out stays what it was.
TRAINING_ALONE = (
    *("festvox-ru", "pocketsphinx-testdata", "ktuberling-data", "gcin-voice"),
    *("warzone2100-music", "planetblupi-music-ogg", "colobot-common-sounds"),
)
DOMAINS = {"speech": "speech", "words": "speech", "music": "music", "sounds": "general"}
SHORTEST_SOUND = 0.3  # seconds; game effects below that are clicks
SILENCE = 1e-3  # peak below which a file holds nothing to learn from
PROCESSES = 2

Download = Callable[[str, Path], Path]


def held_out(package: str, path_in_package: str) -> bool:
    """Whether a file, such as usr/share/…/hello.g722, is kept from training: about 7 in 100 of the packages that this
    project began with, the same on every run."""
    return package not in TRAINING_ALONE and _hash(path_in_package) % 100 < 7


def kind_of(package: str, path_in_package: str) -> str:
    """speech, words, music or sounds."""
    return next(kind for part, kind in PACKAGES[package].items() if part in path_in_package)


def download(package: str, folder: Path) -> Path:
    """Fetch a package's .deb into `folder` with apt-get.

    Raises:
        ValueError: if apt-get cannot, with what it says.
    """
    done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise ValueError(f"{package}: apt-get download failed ({reason}); does `apt-get update` help?")
    return found[0]


def prepare(dest: Path, packages: list[str], rate: int = 24000, fetch: Download = download) -> dict[str, float]:
    """Bring `packages` to `dest` as in the module's drawing; returns the hours of each manifest.

    `fetch(package, folder)` returns a .deb. Packages that are complete in `dest` are kept as they are, also those that
    are not asked for this time; the manifests name all of them.

    Raises:
        ValueError: for unknown packages, a `dest` made with another rate, or, after the others are done, for packages
            that cannot be had.
    """
    for package in packages:
        if package not in PACKAGES:
            raise ValueError(f"package is {package!r}, allowed: {', '.join(PACKAGES)}")
    if rate < 1:
        raise ValueError(f"rate is {rate}, allowed: at least 1")
    tools = ["dpkg-deb"] + ["ffmpeg"] * any(package.endswith("g722") for package in packages)
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        raise ValueError(f"{missing[0]} is not installed, but needed to read the packages")
    records = read_records(dest)
    for record in records:
        if record["rate"] != rate:
            raise ValueError(f"rate is {rate}, allowed: {record['rate']} as {dest} has it, or another folder")
    complete = {record["name"] for record in records}
    failures = []
    for package in packages:
        if package in complete:
            logger.info("%s: complete, kept", package)
            continue
        try:
            _prepare_package(dest, package, rate, fetch)
        except ValueError as error:  # such as a package that this release of Debian does not have: the others count
            failures.append(str(error))
    hours = write_manifests(dest)
    if failures:
        raise ValueError(f"{'; '.join(failures)} (the manifests hold the packages that could be had)")
    return hours


def _prepare_package(dest: Path, package: str, rate: int, fetch: Download) -> None:
    """Download, unpack and convert one package; its record is written last and marks it as complete."""
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=dest) as name:
        folder = Path(name)
        deb = fetch(package, folder)
        tree = folder / "tree"
        try:
            version = _output("dpkg-deb", "-f", deb, "Version").decode().strip()
            _output("dpkg-deb", "-x", deb, tree)
        except ValueError as error:
            raise ValueError(f"{package}: not readable as a package ({error})") from None
        licence = _keep_licence(tree, dest, package)
        paths, twice = _audio_files(tree)
        convert = functools.partial(_convert, tree, dest / "audio" / package, package, rate)
        with get_context("spawn").Pool(PROCESSES) as pool:
            files = [*twice, *pool.imap(convert, paths, chunksize=16)]
    kept = sorted((file for file in files if "skipped" not in file), key=lambda file: file["path_in_package"])
    skipped = [file for file in files if "skipped" in file]
    record = {"name": package, "version": version, "licence": licence, "rate": rate, "files": kept, "skipped": skipped}
    _write_text(dest / "records" / f"{package}.json", json.dumps(record, indent=1, ensure_ascii=False))
    hours = sum(file["seconds"] for file in kept) / 3600
    logger.info("%s %s: %d files, %.2f h, %d skipped", package, version, len(kept), hours, len(skipped))


def _audio_files(tree: Path) -> tuple[list[str], list[dict]]:
    """Paths of the audio in an unpacked package, and those skipped because an earlier file has the same bytes."""
    paths, twice, seen = [], [], {}
    for path in sorted(tree.rglob("*")):
        if path.suffix.lower() not in (".g722", *SNDFILE_SUFFIXES) or path.is_symlink() or not path.is_file():
            continue
        name = path.relative_to(tree).as_posix()
        digest = hashlib.md5(path.read_bytes()).digest()
        if path.stat().st_size and digest in seen:
            twice.append({"path_in_package": name, "skipped": f"same as {seen[digest]}"})
            continue
        seen[digest] = name
        paths.append(name)
    return paths, twice


def _convert(tree: Path, target: Path, package: str, rate: int, name: str) -> dict:
    """One file to FLAC: its length, or the reason why it was skipped."""
    try:
        audio = read_packaged_audio(tree / name, rate)
    except ValueError as error:
        return {"path_in_package": name, "skipped": str(error).removeprefix(f"{tree / name}: ")}
    seconds = audio.shape[1] / rate
    if np.abs(audio).max() < SILENCE:
        return {"path_in_package": name, "skipped": "silent"}
    if kind_of(package, name) == "sounds" and seconds < SHORTEST_SOUND:
        return {"path_in_package": name, "skipped": f"sound of less than {SHORTEST_SOUND} s"}
    write_audio(target / f"{name}.flac", audio, rate)
    return {"path_in_package": name, "seconds": round(seconds, 3)}


def read_packaged_audio(path: Path, rate: int) -> np.ndarray:
    """Audio (channels, T) at `rate` Hz: mono for rates up to 24 kHz and for more than two channels, else as it is.

    Raises:
        ValueError: if the file is empty or no audio.
    """
    if path.suffix.lower() == ".g722":  # raw, so there is no header to tell its rate: always 64 kbps at 16 kHz
        pcm = _output("ffmpeg", "-v", "error", "-f", "g722", "-i", path, "-f", "f32le", "-")
        audio, given = np.frombuffer(pcm, "<f4")[None], 16000
        if audio.size == 0:
            raise ValueError("holds no audio")
    else:
        audio, given = read_audio(path)
    if rate <= 24000 or audio.shape[0] > 2:
        audio = match_channels(audio, 1)
    return resample(audio, given, rate)


def _keep_licence(tree: Path, dest: Path, package: str) -> str:
    """Copy the package's copyright file; returns the licences it names, as far as it is machine-readable (DEP-5)."""
    source = tree / "usr/share/doc" / package / "copyright"
    if not source.is_file():
        raise ValueError(f"{package}: has no copyright file, so its licence is not known")
    text = source.read_text(encoding="utf-8", errors="replace")
    _write_text(dest / "licences" / package, text)
    if not text.startswith("Format:"):
        return f"see licences/{package}"
    names = {name.strip() for name in re.findall(r"^License:(.+)$", text, flags=re.MULTILINE)}
    return ", ".join(sorted(names)) or f"see licences/{package}"


def read_records(dest: Path) -> list[dict]:
    """What is known of each package that is complete in `dest`, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((dest / "records").glob("*.json"))]


def write_manifests(dest: Path) -> dict[str, float]:
    """Write the manifests, packages.json and skipped.jsonl from the records; returns the hours of each manifest."""
    records = read_records(dest)
    lines = [line for record in records for line in _lines(record)]
    training = [line for line in lines if not held_out(line["package"], line["path_in_package"])]
    kept_back = [line for line in lines if held_out(line["package"], line["path_in_package"])]
    manifests = {"train": training, "held_out": _interleave(kept_back)}
    for kind in DOMAINS:
        manifests[kind] = [line for line in training if line["kind"] == kind]
    for name, chosen in manifests.items():
        _write_lines(dest / f"{name}.jsonl", chosen)
    skipped = [{"package": record["name"]} | file for record in records for file in record["skipped"]]
    _write_lines(dest / "skipped.jsonl", skipped)
    summary = [_summary(record) for record in records]
    _write_text(dest / "packages.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return {name: sum(line["seconds"] for line in chosen) / 3600 for name, chosen in manifests.items()}


def _lines(record: dict) -> Iterator[dict]:
    for file in record["files"]:
        kind = kind_of(record["name"], file["path_in_package"])
        yield {
            "path": f"audio/{record['name']}/{file['path_in_package']}.flac",
            "package": record["name"],
            "version": record["version"],
            "path_in_package": file["path_in_package"],
            "seconds": file["seconds"],
            "kind": kind,
            "domain": DOMAINS[kind],
        }


def _interleave(lines: list[dict]) -> list[dict]:
    """Lines in an order that takes the kinds in turn and their files by hash, so that the first few show them all."""
    ranked = []
    for _, group in groupby(sorted(lines, key=lambda line: line["kind"]), key=lambda line: line["kind"]):
        ranked += enumerate(sorted(group, key=lambda line: _hash(line["path_in_package"])))
    return [line for _, line in sorted(ranked, key=lambda pair: (pair[0], pair[1]["kind"]))]


def _summary(record: dict) -> dict:
    kinds = {kind_of(record["name"], file["path_in_package"]) for file in record["files"]}
    return {
        "name": record["name"],
        "version": record["version"],
        "licence": record["licence"],
        "files": len(record["files"]),
        "hours": round(sum(file["seconds"] for file in record["files"]) / 3600, 3),
        "domain": ", ".join(sorted({DOMAINS[kind] for kind in kinds})),
    }


def _hash(path_in_package: str) -> int:
    return int(hashlib.md5(f"x/{path_in_package}".encode()).hexdigest(), 16)


def _output(*command) -> bytes:
    """What a command writes; ValueError with its last words if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines() or [f"{command[0]} failed"]
        raise ValueError(words[-1])
    return done.stdout


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_lines(path: Path, lines: list[dict]) -> None:
    _write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main(argv: list[str] | None = None) -> int:
    """The command; errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="debian_corpora", description="Free training audio from Debian's packages.")
    parser.add_argument("dest", type=Path, metavar="DEST", help="Folder that gets audio and manifests.")
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="NAME", help="Default: all known.")
    parser.add_argument("--rate", type=int, default=24000, help="Sampling rate in Hz; up to 24000 gives mono.")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        hours = prepare(options.dest, options.packages, options.rate)
    except (ValueError, OSError, soundfile.LibsndfileError) as error:
        print(f"debian_corpora: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name + '.jsonl':16} {value:6.2f} h" for name, value in hours.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
