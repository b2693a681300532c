"""`demo`: what the codec does to clips, as files or as a web page."""

import os
from pathlib import Path
from typing import Annotated

import typer

from modeling_encodec.commands.shared import Force, LMModel, Model, load, say, say_stopped
from modeling_encodec.system.stop_signals import Stopped


def demo(
    clips: Annotated[list[Path] | None, typer.Argument(metavar="[CLIP...]", help="Audio files of your own.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("demo_output"),
    model: Model = None,
    lm_model: LMModel = None,
    serve: Annotated[bool, typer.Option("--serve", help="As a web page, on this machine, until Ctrl-C.")] = False,
    host: Annotated[
        str, typer.Option("--host", help="Address of the page; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port of the page; 0 takes any that is free.")] = 7860,
    most_seconds: Annotated[
        float, typer.Option("--most-seconds", help="Seconds of a clip, at most, that the page takes.")
    ] = 60,
    most_megabytes: Annotated[float, typer.Option("--most-megabytes", help="Megabytes of an upload, at most.")] = 30,
    force: Force = False,
) -> None:
    """Clips through the codec at every bandwidth: wavs, a table of cost and quality, spectrograms. Or a web page."""
    if serve:
        if clips:
            raise ValueError("--serve takes no clips: they are uploaded in the page")
        _serve(model, lm_model, host, port, most_seconds, most_megabytes)
        return
    from modeling_encodec.demo.table import demo_clips, run_demo

    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; --force writes into it all the same")
    codec, lm = _models(model, lm_model)
    rows = run_demo(codec, clips or demo_clips(), out, lm)
    typer.echo(
        f"{'clip':12} {'kbps':>5} {'bytes':>7} {'with LM':>7} {'measured':>9} {'ratio':>6} {'SI-SNR':>8} "
        f"{'encode':>8} {'decode':>8}"
    )
    for row in rows:
        coded = "-" if row.lm_bytes is None else row.lm_bytes
        typer.echo(
            f"{row.clip:12.12} {row.bandwidth:5g} {row.bytes:7} {coded:>7} {row.kbps:9.3f} {row.ratio:5.0f}x "
            f"{row.si_snr:5.1f} dB {row.encode_seconds:6.2f} s {row.decode_seconds:6.2f} s"
        )
    typer.echo(f"wavs, .ecdc files and spectrograms.png are in {out}")


def _serve(model, lm_model, host, port, most_seconds, most_megabytes) -> None:
    from modeling_encodec.demo.web.clips import Limits
    from modeling_encodec.demo.web.serving import serve

    limits = Limits(most_seconds, most_megabytes)
    codec, lm = _models(model, lm_model)
    on_start = lambda address: say(f"the page is at {address} (Ctrl-C ends it)")  # noqa: E731
    try:
        serve(codec, lm, host=host, port=port, limits=limits, on_start=on_start)
    except (KeyboardInterrupt, Stopped) as error:
        os._exit(say_stopped(error))  # Python would wait for the clip in hand


def _models(model: str | None, lm_model: str | None):
    """The codec and its language model; the bundled one goes with the bundled codec alone."""
    from modeling_encodec.checkpoints import bundled_checkpoint, bundled_lm_checkpoint

    if model is None and lm_model is None:
        lm_model = str(bundled_lm_checkpoint())
    codec = load(model or str(bundled_checkpoint()), "cpu")
    return codec, None if lm_model is None else load(lm_model, "cpu", "EncodecLM")
