"""`encode`, `decode` and `info`: audio to .ecdc files and back."""

import contextlib
import io
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from modeling_encodec.commands.shared import (
    LM_DEVICE,
    Device,
    Force,
    LMModel,
    Model,
    NamedModel,
    Precision,
    UsageError,
    load,
    one_line,
    say,
)
from modeling_encodec.system.atomic import atomic_path, named_errors
from modeling_encodec.system.stop_signals import raise_if_stopped


STREAM = "-"
SUFFIX = ".ecdc"

Paths = Annotated[
    list[str], typer.Argument(metavar="IN... OUT", help="Files or folders, then the target. '-' is a pipe.")
]
Stream = Annotated[bool, typer.Option("--stream", help="Live, in a pipe: raw 16-bit PCM at the model's rate, '- -'.")]
NamedLM = Annotated[
    str | None,
    typer.Option("--lm-model", help="Language model: folder or Hub id (default: the one that a file names)."),
]
Mode = Annotated[
    str, typer.Option("--mode", help="Of a stream: exact (as a file), low_latency (no wait at its beginning).")
]


def encode(
    paths: Paths,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", "-b", help="kbps (default: 6, or nearest).")
    ] = None,
    lm: Annotated[bool, typer.Option("--lm", help="Entropy-code with the bundled language model.")] = False,
    model: Model = None,
    lm_model: LMModel = None,
    original: Annotated[
        bool, typer.Option("--original", help="Write version 0, which the encodec package reads.")
    ] = False,
    segment: Annotated[
        float | None, typer.Option("--segment", help="Seconds that are checked as one (default: 10; streams: 0.1).")
    ] = None,
    stream: Stream = False,
    mode: Mode = "exact",
    precision: Precision = "exact",
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """Audio files to .ecdc files. Several files, or a folder, go into a folder."""
    from modeling_encodec.bitstream.codes_file import SEGMENT_SECONDS
    from modeling_encodec.bitstream.compression import compress_blocks, compress_to_file, name_of
    from modeling_encodec.checkpoints import bundled_checkpoint, bundled_lm_checkpoint
    from modeling_encodec.processors.audio import AudioReader, read_audio
    from modeling_encodec.processors.audio_kinds import OtherFiles, list_audio

    _check_stream(stream, paths, mode, original=original)
    if original and segment is not None:
        raise ValueError("--segment goes with version 1, not with --original")
    other = OtherFiles()
    try:
        jobs = _plan(paths, lambda folder: list_audio(folder, other), SUFFIX, force)
    finally:
        for line in other.lines():
            say(line)
    codec = load(model or str(bundled_checkpoint()), device)
    codec.precision = precision
    language_model = None
    if lm or lm_model:
        language_model = load(lm_model or str(bundled_lm_checkpoint()), LM_DEVICE, "EncodecLM")
    bandwidths = list(codec.config.target_bandwidths)
    if bandwidth is None:
        bandwidth = min(bandwidths, key=lambda allowed: abs(allowed - 6))
    elif bandwidth not in bandwidths:
        raise ValueError(f"bandwidth is {bandwidth:g} kbps, allowed: {', '.join(f'{b:g}' for b in bandwidths)}")

    sounds_like = codec.config.sampling_rate, codec.config.audio_channels
    if stream:
        from modeling_encodec.bitstream.live import LIVE_SEGMENT_SECONDS, encode_live

        encode_live(
            codec,
            _standard("stdin"),
            _standard("stdout"),
            num_quantizers=codec.config.num_quantizers_for_bandwidth(bandwidth),
            model_name=name_of(codec),
            mode=mode,
            lm=language_model,
            lm_name=language_model and name_of(language_model),
            segment_seconds=LIVE_SEGMENT_SECONDS if segment is None else segment,
        )
        return

    def job(source: str, target: str) -> None:
        with _open_source(source) as file:
            if original:  # its header says the length first
                audio, _ = read_audio(file, *sounds_like)
                with _open_target(target) as coded:
                    compress_to_file(codec, audio, coded, bandwidth, language_model, version=0)
                return
            with AudioReader(file, *sounds_like) as audio, _open_target(target) as coded:
                blocks = _progress(audio, audio.seconds, codec.config.sampling_rate, source)
                seconds = SEGMENT_SECONDS if segment is None else segment
                compress_blocks(codec, blocks, coded, bandwidth, language_model, segment_seconds=seconds)

    _run(job, jobs, "encode")


def decode(
    paths: Paths,
    model: NamedModel = None,
    lm_model: NamedLM = None,
    strict: Annotated[bool, typer.Option("--strict", help="Damage is an error, and nothing is written.")] = False,
    conceal: Annotated[str, typer.Option("--conceal", help="Damaged parts become: silence, repeat.")] = "silence",
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", help="Hours that a file may hold (default: 24; streams: any).")
    ] = None,
    other_decoder: Annotated[
        bool, typer.Option("--other-decoder", help="Take a model with the file's codebooks and another decoder.")
    ] = False,
    device: Device = "cpu",
    rescale: Annotated[bool, typer.Option("--rescale", "-r", help="Scale down audio that would clip.")] = False,
    stream: Stream = False,
    mode: Mode = "exact",
    precision: Precision = "exact",
    force: Force = False,
) -> None:
    """.ecdc files to audio files (.wav, .flac, .ogg, .mp3 by the target's name). The file names its model."""
    from modeling_encodec.bitstream.codes_file import MAX_SECONDS
    from modeling_encodec.bitstream.compression import decompress_blocks, read_any_header
    from modeling_encodec.checkpoints import checkpoint_for, lm_checkpoint_for
    from modeling_encodec.processors.audio import write_audio_blocks

    _check_stream(stream, paths, mode, rescale=rescale, strict=strict)
    jobs = _plan(paths, _coded_files, ".wav", force)
    loaded = {}

    def loaded_once(name: str, kind: str):
        if (name, kind) not in loaded:
            loaded[name, kind] = load(name, LM_DEVICE if kind == "EncodecLM" else device, kind)
        return loaded[name, kind]

    def models(header):
        codec = loaded_once(model or checkpoint_for(header.model_name), "EncodecModel")
        codec.precision = precision
        coded_with = lm_model
        if coded_with is None and getattr(header, "lm_name", None) is not None:
            coded_with = lm_checkpoint_for(header.lm_name)
        return codec, loaded_once(coded_with, "EncodecLM") if coded_with else None

    if stream:
        from modeling_encodec.bitstream.live import decode_live

        decode_live(
            models,
            _standard("stdin"),
            _standard("stdout"),
            mode=mode,
            conceal=conceal,
            other_decoder=other_decoder,
            on_damage=lambda damage, rate: say(f"concealed: {damage.describe(rate)}"),
            max_seconds=None if max_hours is None else 3600 * max_hours,
        )
        return

    def job(source: str, target: str) -> None:
        with _open_source(source) as file:
            header, _ = _peek(file, read_any_header)
            codec, language_model = models(header)
            damages = []
            blocks, rate = decompress_blocks(
                file,
                codec,
                language_model,
                strict=strict,
                conceal=conceal,
                other_decoder=other_decoder,
                on_damage=damages.append,
                max_seconds=MAX_SECONDS if max_hours is None else 3600 * max_hours,
            )
        for damage in damages:
            say(f"{source}: concealed: {damage.describe(rate)}")
        seconds = header.audio_length and header.audio_length / rate
        blocks = _progress((block.float().cpu().numpy() for block in blocks), seconds, rate, source)
        if target == STREAM:
            with _open_target(target) as file:
                clipping = write_audio_blocks(file, blocks, rate, rescale=rescale)
        else:
            clipping = write_audio_blocks(target, blocks, rate, rescale=rescale)
        if clipping and not clipping.rescaled:
            say(f"{target}: {clipping.samples} samples clipped (peak {clipping.peak:.2f}); --rescale avoids it")

    _run(job, jobs, "decode")


def info(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help=".ecdc files.")], model: NamedModel = None
) -> None:
    """What .ecdc files hold."""
    from modeling_encodec.bitstream.inspection import describe

    for name in files:
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such file")
        with open(name, "rb") as file:
            lines = describe(file, Path(name).stat().st_size, model)
        typer.echo("\n".join([name, *(f"  {key:14} {value}" for key, value in lines.items())]))


# ---- files -----------------------------------------------------------------------------------------------------


def _coded_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() == SUFFIX)


def _plan(paths: list[str], find: Callable[[Path], list[Path]], new_suffix: str, force: bool) -> list[tuple[str, str]]:
    """(source, target) of every file to make, of folders those that `find` finds. Everything that can be refused is
    refused before work starts."""
    if len(paths) < 2:
        raise UsageError("give at least one input and the output: IN... OUT")
    if "" in paths:
        raise ValueError("one of the paths is empty")
    *sources, target = paths
    if len(sources) == 1 and not Path(sources[0]).is_dir() and not Path(target).is_dir():
        jobs = [(sources[0], target)]
    else:
        if target == STREAM or STREAM in sources:
            raise ValueError("'-' goes with one input and one output, not with folders or several files")
        if Path(target).is_file():
            raise ValueError(f"{target} is a file, allowed: a folder, for several inputs")
        jobs = list(_folder_jobs(sources, Path(target), find, new_suffix))
        if not jobs:
            kind = "audio" if new_suffix == SUFFIX else SUFFIX
            raise ValueError(f"no {kind} files in {', '.join(sources)}")
    times = Counter(made for _, made in jobs)
    twice = next((made for made, count in times.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two inputs would both become {twice}")
    for source, made in jobs:
        if source != STREAM and not Path(source).is_file():
            raise FileNotFoundError(f"{source}: no such file")
        if made == STREAM or not Path(made).exists():
            continue
        if source != STREAM and Path(made).samefile(source):
            raise ValueError(f"{made} is both input and output")
        if not force:
            raise FileExistsError(f"{made} exists; --force overwrites it")
    return jobs


def _folder_jobs(sources, folder: Path, find: Callable, new_suffix: str) -> Iterator[tuple[str, str]]:
    """Files keep their place below the folder they were found in."""
    for source in map(Path, sources):
        if not source.is_dir():
            yield str(source), str(folder / source.with_suffix(new_suffix).name)
            continue
        files = [found.relative_to(source) for found in find(source)]
        shared = Counter(file.with_suffix(new_suffix) for file in files)
        for file in files:
            made = file.with_suffix(new_suffix)
            # Of a.wav and a.mp3 one would be lost.
            made = made if shared[made] == 1 else file.with_name(file.name + new_suffix)
            yield str(source / file), str(folder / made)


def _run(job: Callable[[str, str], None], jobs: list[tuple[str, str]], verb: str) -> None:
    """Do every job; one that fails is named and the others go on."""
    from tqdm import tqdm

    failed = 0
    for source, target in tqdm(jobs, desc=verb, unit="file", disable=len(jobs) == 1 or not sys.stderr.isatty()):
        try:
            job(source, target)
        except BrokenPipeError:  # nobody reads the results
            raise
        except (ValueError, OSError, RuntimeError) as error:
            message = one_line(error)
            message = message if source in message else f"{source}: {message}"
            if len(jobs) == 1:
                raise ValueError(message) from None
            failed += 1
            tqdm.write(message, file=sys.stderr)
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} files failed")


@contextlib.contextmanager
def _open_source(source: str) -> Iterator[BinaryIO]:
    if source != STREAM:
        with open(source, "rb") as file:
            yield file
        return
    # Audio files are read with seeks, which a pipe has not.
    with named_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        shutil.copyfileobj(_standard("stdin"), file)
        file.seek(0)
        yield file


@contextlib.contextmanager
def _open_target(target: str) -> Iterator[BinaryIO]:
    if target == STREAM:
        stdout = _standard("stdout")
        with named_errors(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with named_errors("stdout"):
                shutil.copyfileobj(file, stdout)
                stdout.flush()
        return
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        yield file


def _standard(name: str) -> BinaryIO:
    """The bytes of stdin or stdout."""
    stream = getattr(sys, name)
    if stream is None:
        raise ValueError(f"{name} is closed, allowed: open, for '-'")
    if isinstance(stream.buffer, io.RawIOBase):  # of `python -u`; it may write a part and say nothing
        return open(stream.fileno(), stream.buffer.mode, closefd=False)
    return stream.buffer


def _check_stream(stream: bool, paths: list[str], mode: str, **of_files: bool) -> None:
    """Refuse what streams and files have not in common."""
    if not stream:
        if mode != "exact":
            raise ValueError(f"mode is {mode!r}, allowed: 'exact', but with --stream")
        return
    if paths != [STREAM, STREAM]:
        raise ValueError(f"--stream goes from pipe to pipe, '- -', not {' '.join(paths)}")
    given = [f"--{name}" for name, value in of_files.items() if value]
    if given:
        raise ValueError(f"{given[0]} goes with files, not with --stream")


def _progress(blocks: Iterable, seconds: float | None, rate: int, name: str) -> Iterator:
    """The blocks (channels, T), with a bar in seconds of audio on a terminal."""
    from tqdm import tqdm

    form = "{l_bar}{bar}| {n:.0f}/{total_fmt} s [{elapsed}<{remaining}]" if seconds else None
    off = not sys.stderr.isatty()
    with tqdm(
        total=seconds and round(seconds, 1), desc=name, unit="s", leave=False, bar_format=form, disable=off
    ) as bar:
        for block in blocks:
            raise_if_stopped()
            yield block
            bar.update(block.shape[1] / rate)


def _peek(file: BinaryIO, read: Callable):
    """What `read` finds at the file's place, which stays."""
    start = file.tell()
    found = read(file)
    file.seek(start)
    return found
