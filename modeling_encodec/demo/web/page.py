"""The web page itself: two tabs over `clips`, as Gradio blocks. `serving` puts it on the network.

A request leaves nothing behind but files in Gradio's cache folder, and shares nothing with others but the model. Of
its users one runs at a time: two at once would end no sooner and take twice the memory. They run in a thread that
nobody waits for when the server ends.
"""

import asyncio
import html
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from modeling_encodec.bitstream.compression import name_of
from modeling_encodec.demo.table import demo_clips
from modeling_encodec.demo.web.clips import CodedClip, Limits, code_clip, decode_file
from modeling_encodec.evaluation.loudness import equalise
from modeling_encodec.evaluation.plots import plot_audio, plot_codes, save_figure
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.audio import write_audio


try:
    import gradio as gr
    import matplotlib  # noqa: F401
    from gradio.utils import get_upload_folder
except ImportError:
    raise ImportError('the web page needs gradio and matplotlib: pip install "modeling-encodec[demo]"') from None


PLAYER = {"interactive": False, "buttons": ["download"]}
PICTURE = {"interactive": False, "buttons": ["download", "fullscreen"], "elem_classes": "picture"}
ERRORS = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)
# Files of a request are deleted when they are a day old, looked for every hour; all of them when the server ends.
DELETE_CACHE = (3600, 86400)
MAX_WAITING = 32  # users in the queue; others are told that it is full
USES_MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
CSS = """
.facts table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
.facts th, .facts td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--border-color-primary) }
.facts th { font-weight: 600 }
.facts th:first-child, .facts td:first-child, .facts.said td { text-align: left }
.facts.said td:first-child { white-space: nowrap; color: var(--body-text-color-subdued); vertical-align: top }
.facts .chosen td { font-weight: 600 }
.facts .damage { color: var(--error-icon-color); font-weight: 600 }
.picture img { padding-top: 40px }
/* What went wrong is said in a message; the file stays to be seen. */
#clip [data-testid=status-tracker]:has(.error), #file [data-testid=status-tracker]:has(.error) { display: none }
"""
# The audio element of a player by its id, which Gradio keeps out of the document's reach.
FIND_AUDIO = """(id) => {
  const audio = (node) => {
    for (const inside of node.querySelectorAll("*")) {
      const found = inside.tagName === "AUDIO" && inside.src ? inside : inside.shadowRoot && audio(inside.shadowRoot);
      if (found) return found;
    }
  };
  const place = document.getElementById(id);
  return place && audio(place);
}"""
# Goes on at the same place in the other player.
SWITCH = (
    f"() => {{ const find = {FIND_AUDIO};"
    + """
  const [one, other] = ["original", "decoded"].map(find);
  if (!one || !other) return;
  const [from, to] = other.paused ? [one, other] : [other, one];
  to.currentTime = from.paused ? 0 : from.currentTime;
  from.pause();
  to.play();
}"""
)


def build_page(model: EncodecModel, lm: EncodecLM | None = None, limits: Limits | None = None) -> "gr.Blocks":
    """The page for one model; with a language model it can be switched on.

    Args:
        model: the codec.
        lm: its language model, with the integer form.
        limits: of what is taken; `Limits()` by default.

    Raises:
        ImportError: without Gradio or Matplotlib.
    """
    limits = limits or Limits()
    Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
    with gr.Blocks(title="EnCodec", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.Markdown(_introduction(model, lm, limits), elem_id="introduction")
        worker = ThreadPoolExecutor(1, "model")
        with gr.Tab("Encode"):
            _encode_tab(model, lm, limits, worker)
        with gr.Tab("Decode", elem_id="decode-tab"):
            _decode_tab(model, lm, limits, worker)
    return page.queue(api_open=False, max_size=MAX_WAITING)


def _encode_tab(model: EncodecModel, lm: EncodecLM | None, limits: Limits, worker: Executor) -> None:
    with gr.Row():
        with gr.Column(scale=3):
            clip = gr.Audio(
                label=f"Clip, up to {limits.seconds:g} s",
                sources=["upload", "microphone"],
                type="filepath",
                buttons=["download"],
                elem_id="clip",
            )
            examples = [[str(path)] for path in demo_clips()]
            gr.Examples(examples, clip, example_labels=[path.stem for path in demo_clips()], label="Or an example")
        with gr.Column(scale=2):
            bandwidths = model.config.target_bandwidths
            bandwidth = gr.Radio(
                [(f"{kbps:g}", kbps) for kbps in bandwidths],
                value=min(bandwidths, key=lambda kbps: abs(kbps - 6)),
                label="Bandwidth (kbps)",
                elem_id="bandwidth",
            )
            use_lm = gr.Checkbox(
                lm is not None,
                label="Language model",
                info="The same codes in fewer bytes; takes longer.",
                visible=lm is not None,
                elem_id="lm",
            )
            button = gr.Button("Encode", variant="primary", elem_id="encode")
    with gr.Column(visible=False, elem_id="coded") as results:
        facts = gr.HTML(apply_default_css=False, elem_id="coded-facts")
        with gr.Row(equal_height=True):
            original = gr.Audio(label="Original", elem_id="original", **PLAYER)
            decoded = gr.Audio(label="Decoded", elem_id="decoded", **PLAYER)
        with gr.Row(equal_height=True):
            switch = gr.Button("Switch between the two while playing", elem_id="switch")
            download = gr.DownloadButton("Download the .ecdc", elem_id="download")
        loudness = gr.Markdown(elem_id="loudness")
        pictures = gr.Image(label="Waveforms and mel spectrograms", elem_id="coded-audio", **PICTURE)
        codes = gr.Image(label="Codes", elem_id="coded-codes", **PICTURE)
    outputs = [results, facts, original, decoded, download, loudness, pictures, codes]

    def encode(path: str | None, kbps: float, with_lm: bool):
        if path is None:
            raise ValueError("there is no clip yet: upload or record one, or choose an example")
        coded = code_clip(model, path, kbps, lm=lm if with_lm else None, limits=limits)
        return _show_coded(coded, model)

    switch.click(None, js=SWITCH, api_visibility="private")
    button.click(_in_the_page(encode, worker), [clip, bandwidth, use_lm], outputs, show_progress_on=clip, **USES_MODEL)


def _decode_tab(model: EncodecModel, lm: EncodecLM | None, limits: Limits, worker: Executor) -> None:
    with gr.Row():
        file = gr.File(label=f".ecdc file, up to {limits.seconds:g} s", height=140, elem_id="file", scale=3)
        with gr.Column(scale=2):
            gr.Markdown(
                "A file made with this model, with or without its language model. Damaged parts become silence, and "
                "are named with their time."
            )
            button = gr.Button("Decode", variant="primary", elem_id="decode")
    with gr.Column(visible=False, elem_id="read") as results:
        facts = gr.HTML(apply_default_css=False, elem_id="read-facts")
        audio = gr.Audio(label="Decoded", elem_id="read-audio", **PLAYER)
        pictures = gr.Image(label="Waveform and mel spectrogram", elem_id="read-picture", **PICTURE)
        codes = gr.Image(label="Codes", elem_id="read-codes", **PICTURE)

    def decode(path: str | None):
        if path is None:
            raise ValueError("there is no file yet: upload an .ecdc file")
        read, folder = decode_file(model, path, lm=lm, limits=limits), _new_folder()
        wav = folder / f"{Path(read.name).stem}.wav"
        write_audio(wav, read.audio, read.sampling_rate, rescale=True)
        damages = "".join(
            f'<tr><td>damaged</td><td class="damage">{html.escape(line)}</td></tr>' for line in read.damages
        )
        said = {key: value for key, value in read.description.items() if key != "damage"}
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in said.items()
        )
        drawn = _draw({"decoded": read.audio}, read.codes, model, folder)
        return gr.update(visible=True), _as_table(rows + damages, "facts said"), wav, *drawn

    button.click(
        _in_the_page(decode, worker),
        file,
        [results, facts, audio, pictures, codes],
        show_progress_on=file,
        **USES_MODEL,
    )


def _in_the_page(function: Callable, worker: Executor) -> Callable:
    """Run by the worker. What goes wrong by the user's doing as one message in the page; texts of files cannot be
    markup there."""

    async def call(*inputs):
        try:
            return await asyncio.get_running_loop().run_in_executor(worker, function, *inputs)
        except ERRORS as error:
            line = " ".join(str(error).split()) or type(error).__name__
            raise gr.Error(html.escape(line), duration=30, print_exception=False) from None

    return call


def _introduction(model: EncodecModel, lm: EncodecLM | None, limits: Limits) -> str:
    config = model.config
    kind = {1: "mono", 2: "stereo"}.get(config.audio_channels, f"{config.audio_channels} channels")
    by_lm = "" if lm is None else f", language model `{name_of(lm)}`"
    return (
        "# EnCodec\n"
        f"Audio to codes and back, with `{name_of(model)}` ({config.sampling_rate / 1000:g} kHz, {kind}){by_lm}. "
        "Everything is computed on the machine that serves this page; nothing leaves it."
    )


def _show_coded(coded: CodedClip, model: EncodecModel) -> tuple:
    folder, rate = _new_folder(), coded.sampling_rate
    versions = {"original": coded.audio, "decoded": coded.decoded}
    heard, gains = equalise(versions, "original")
    for name, audio in heard.items():
        write_audio(folder / f"{name}.wav", audio, rate)
    (folder / coded.file_name).write_bytes(coded.data)
    loudness = (
        "Both players are equally loud, so that neither sounds better for being louder: the same RMS over the clip, "
        f"both scaled down alike if one would clip (here: original {_decibels(gains['original'])}, "
        f"decoded {_decibels(gains['decoded'])})."
    )
    drawn = _draw(versions, coded.codes, model, folder)
    players = [folder / f"{name}.wav" for name in heard]
    download = gr.update(label=f"Download {coded.file_name}", value=folder / coded.file_name)
    return gr.update(visible=True), _cost(coded), *players, download, loudness, *drawn


def _cost(coded: CodedClip) -> str:
    """The table of bytes, kbps and ratio; what can be downloaded stands out."""
    quality = "–" if coded.si_snr is None else f"{coded.si_snr:.1f} dB"
    sizes = {"16-bit PCM": coded.pcm_bytes, f"{coded.bandwidth:g} kbps": coded.packed_bytes}
    if coded.lm_bytes is not None:
        sizes[f"{coded.bandwidth:g} kbps with language model"] = coded.lm_bytes
    head = ("", "bytes", "kbps, measured", "ratio to PCM", "SI-SNR", "duration")
    rows = "<tr>" + "".join(f"<th>{title}</th>" for title in head) + "</tr>"
    for name, size in sizes.items():
        same = name == "16-bit PCM"
        cells = (
            html.escape(coded.name) + ", " + name if same else name,
            f"{size:,}",
            f"{coded.kbps(size):.2f}",
            f"{coded.pcm_bytes / size:.1f}",
            "" if same else quality,
            f"{coded.seconds:.2f} s",
        )
        chosen = ' class="chosen"' if name == list(sizes)[-1] else ""
        rows += f"<tr{chosen}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return _as_table(rows, "facts")


def _as_table(rows: str, kind: str) -> str:
    return f'<div class="{kind}"><table>{rows}</table></div>'


def _draw(versions: dict[str, np.ndarray], codes: np.ndarray, model: EncodecModel, folder: Path) -> tuple[Path, Path]:
    config = model.config
    figure = plot_audio({"": versions}, config.sampling_rate)
    figure.set_size_inches(11, 3.6)
    save_figure(figure, folder / "audio.png")
    figure = plot_codes(codes, config.codebook_size, frame_rate=config.sampling_rate / config.hop_length)
    figure.set_size_inches(11, figure.get_figheight())
    save_figure(figure, folder / "codes.png")
    return folder / "audio.png", folder / "codes.png"


def _decibels(gain: float) -> str:
    return f"{20 * np.log10(gain) + 0.0:+.1f} dB"


def _new_folder() -> Path:
    """For one request's files, where Gradio serves from. A server that has ended has no such place any more."""
    return Path(tempfile.mkdtemp(dir=get_upload_folder()))
