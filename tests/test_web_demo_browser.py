"""The web page as its users have it: a server of its own, clicked through in Chromium."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from ecdc_files import spoil

from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.checkpoints import bundled_lm_checkpoint
from modeling_encodec.demo.table import demo_clips
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.audio import read_audio


pytest.importorskip("gradio")
pytest.importorskip("playwright")

from web_browser import (  # noqa: E402
    CHROMIUM,
    MEASURE,
    chromium,
    clear,
    encode,
    message,
    new_user,
    open_page,
    served,
    upload,
)

from modeling_encodec.demo.web.page import FIND_AUDIO  # noqa: E402


if CHROMIUM is None:
    pytest.skip("chromium is not at hand", allow_module_level=True)

# Says which addresses a process asked for, by name or number.
LISTENER = """
import os, sys
log = os.open(os.environ["ASKED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def hear(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        os.write(log, f"{arguments[1][0]}\\n".encode())
    elif event == "socket.getaddrinfo":
        os.write(log, f"{arguments[0]}\\n".encode())
sys.addaudithook(hear)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips: speech in stereo at 44.1 kHz with a name from elsewhere, music at 24 kHz; and no clips."""
    folder = tmp_path_factory.mktemp("clips")
    speech, music = (read_audio(path)[0][0] for path in demo_clips())
    speech, _ = read_audio(demo_clips()[0], 44100)
    soundfile.write(
        folder / "grüße 音.flac", np.stack([speech[0, 22050:110250], 0.5 * speech[0, 22050:110250]], 1), 44100
    )
    soundfile.write(folder / "music.wav", music[:36000], 24000)
    soundfile.write(folder / "recorded.wav", 0.5 * np.sin(np.arange(48000 * 4) * 2 * np.pi * 440 / 48000), 48000)
    soundfile.write(folder / "nan.wav", np.full(2400, np.nan), 24000, subtype="FLOAT")
    soundfile.write(folder / "long.wav", np.zeros(8000 * 11), 8000)
    soundfile.write(folder / "big.wav", np.zeros(600000), 24000)
    (folder / "text.wav").write_text("no audio")
    (folder / "text.ecdc").write_text("no codes at all")
    return folder


@dataclass(frozen=True)
class Server:
    """Where the page is, the process, its folder for temporary files, and what lists the addresses it asked for."""

    address: str
    process: subprocess.Popen
    temporary: Path
    log: Path


@pytest.fixture(scope="module")
def server(folder):
    (folder / "sitecustomize.py").write_text(LISTENER)
    (folder / "temporary").mkdir()
    env = {"PYTHONPATH": folder, "ASKED": folder / "asked.txt", "TMPDIR": folder / "temporary"}
    env = os.environ | {name: str(path) for name, path in env.items()} | {"GRADIO_ANALYTICS_ENABLED": "True"}
    with served("--most-seconds", "10", "--most-megabytes", "1", env=env) as (address, process):
        yield Server(address, process, folder / "temporary", folder / "asked.txt")


@pytest.fixture(scope="module")
def browser(folder):
    microphone = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with chromium(*microphone, f"--use-file-for-fake-audio-capture={folder / 'recorded.wav'}") as browser:
        yield browser


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return []


@pytest.fixture(scope="module")
def user(browser):
    return new_user(browser)


@pytest.fixture
def page(server, user, asked):
    page = open_page(user, server.address, asked)
    yield page
    page.close()


@pytest.fixture(scope="module")
def lm() -> EncodecLM:
    return EncodecLM.from_pretrained(bundled_lm_checkpoint()).eval()


def download(page, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.click("#download")
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def decode(page, path: Path) -> None:
    page.get_by_role("tab", name="Decode").click()
    upload(page, "file", path)
    page.click("#decode")


def test_encode_play_download_decode(page, folder, tmp_path, bundled_model, lm, asked, server):
    clip = folder / "grüße 音.flac"
    encode(page, clip, "3", True)
    audio, _ = read_audio(clip, 24000, 1)
    data = compress(bundled_model, audio, 3.0, lm)
    cells = page.locator("#coded-facts tr.chosen td").all_inner_texts()
    assert cells[1:4] == [f"{len(data):,}", f"{8 * len(data) / 2000:.2f}", f"{2 * audio.size / len(data):.1f}"]
    assert cells[5] == "2.00 s"
    original, decoded = (page.evaluate(MEASURE, player) for player in ("original", "decoded"))
    assert original["samples"] == decoded["samples"] == 48000 and original["seconds"] == pytest.approx(2)
    assert original["rms"] == pytest.approx(decoded["rms"], rel=1e-3) and original["rms"] > 0.01
    assert max(original["peak"], decoded["peak"]) <= 0.991
    plays = f"(id) => {{ const audio = ({FIND_AUDIO})(id); return !audio.paused && audio.currentTime > 0.1; }}"
    page.locator("#original [aria-label*=Play]").first.click()
    page.wait_for_function(plays, arg="original")
    page.click("#switch")
    page.wait_for_function(plays, arg="decoded")
    assert page.evaluate(f"(id) => ({FIND_AUDIO})(id).paused", "original")
    page.locator("#bandwidth label").get_by_text("12", exact=True).click()  # what was coded stays what it is
    path = download(page, tmp_path)
    assert path.name == "grüße 音_3kbps_lm.ecdc" and path.read_bytes() == data
    decode(page, path)
    page.wait_for_selector("#read-facts :text('2.00 s')")
    assert "encodec_lm_24khz_c16" in page.inner_text("#read-facts") and not page.locator("#read .damage").count()
    page.wait_for_function(f"({FIND_AUDIO})('read-audio')?.duration > 1.99")
    heard, samples = page.evaluate(MEASURE, "read-audio"), decompress(data, bundled_model, lm)[0]
    assert heard["rms"] == pytest.approx(samples.square().mean().sqrt().item(), rel=1e-2)
    page.wait_for_function("[...document.querySelectorAll('#read .picture img')].every((i) => i.naturalWidth > 600)")
    here = (server.address, f"blob:{server.address}", "data:")
    assert asked and not [url for url in asked if not url.startswith(here)]
    assert set(server.log.read_text().split()) <= {"127.0.0.1", "localhost"}
    audio, _ = read_audio(demo_clips()[1])
    path = tmp_path / "damaged.ecdc"
    path.write_bytes(spoil(compress(bundled_model, audio[:, :72000], 1.5, segment_seconds=1.0), 1))
    decode(page, path)
    page.wait_for_selector("#read-facts .damage")
    assert "segment 1 (1.00 s to 2.00 s)" in page.inner_text("#read-facts .damage")
    page.wait_for_function(f"({FIND_AUDIO})('read-audio')?.duration > 2.9")


def test_bad_files_get_a_message_and_the_page_goes_on(page, folder, tmp_path, bundled_model):
    page.click("#encode")
    assert "there is no clip yet" in message(page)
    for name, words in (
        ("text.wav", "text.wav: not readable as audio"),
        ("nan.wav", "nan.wav: holds samples that are NaN"),
        ("long.wav", "long.wav is 11.0 s long, allowed: up to 10 s"),
    ):
        upload(page, "clip", folder / name)
        page.click("#encode")
        assert words in message(page)
    clear(page, "clip")
    page.set_input_files("#clip input[type=file]", folder / "big.wav")
    assert 'exceed the maximum allowed size of 1.0 Mb: "big.wav"' in message(page)
    (tmp_path / "cut.ecdc").write_bytes(compress(bundled_model, np.zeros((1, 24000), np.float32), 1.5)[:100])
    for path, words in ((folder / "text.ecdc", "text.ecdc: not an .ecdc file"), (tmp_path / "cut.ecdc", "no segment")):
        decode(page, path)
        assert words in message(page)
    page.reload()
    encode(page, folder / "music.wav", "1.5", False)
    assert page.locator("#coded-facts tr").count() == 3  # without the language model


def test_the_microphone(page):
    page.locator("#clip [aria-label='Record audio']").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    page.wait_for_function(f"({FIND_AUDIO})('clip')?.duration > 0.5")
    page.locator("#lm input").set_checked(False)
    page.click("#encode")
    for player in ("original", "decoded"):  # either may come first
        page.wait_for_function(f"(id) => ({FIND_AUDIO})(id)?.duration > 0.5", arg=player)
    assert page.evaluate(MEASURE, "original")["rms"] > 0.1  # the tone, at half of full scale


def test_two_users_do_not_meet(page, browser, server, folder, tmp_path, bundled_model, asked):
    other = open_page(new_user(browser), server.address, asked)
    clips = {page: demo_clips()[1], other: folder / "grüße 音.flac"}
    page.get_by_role("button", name="music").click()  # the example
    page.wait_for_function(f"({FIND_AUDIO})('clip')?.duration > 4")
    upload(other, "clip", clips[other])
    for user in clips:
        user.locator("#lm input").set_checked(False)
    for user in clips:
        user.dblclick("#encode")
    for user, clip in clips.items():
        user.wait_for_selector(f"#coded-facts :text('{clip.name}')")
        user.wait_for_function("document.querySelector('#download').innerText.includes('6kbps')")
        audio, _ = read_audio(clip, 24000, 1)
        assert download(user, tmp_path).read_bytes() == compress(bundled_model, audio, 6.0)
    other.context.close()


def test_no_file_of_the_machine_can_be_had(server):
    """Neither asked for nor named as if it had been uploaded."""
    address = server.address
    with urllib.request.urlopen(f"{address}/config", timeout=30) as answer:
        config = json.load(answer)
    secret = Path(sys.prefix) / "pyvenv.cfg" if os.path.exists(f"{sys.prefix}/pyvenv.cfg") else Path(os.__file__)
    for name in (secret, "http://example.com/a.wav", "https://example.com/a.wav"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/gradio_api/file={name}", timeout=30)
    assert set(server.log.read_text().split()) <= {"127.0.0.1", "localhost"}
    button = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "decode")
    number = next(d["id"] for d in config["dependencies"] if [button, "click"] in [list(t) for t in d["targets"]])
    data = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [data], "fn_index": number, "session_hash": "x"}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)


def test_ctrl_c_ends_it_and_leaves_nothing(server, page, folder):
    """The last test: others need the server."""
    upload(page, "clip", folder / "music.wav")
    assert list(server.temporary.rglob("music.wav"))
    page.click("#encode")
    page.wait_for_timeout(300)  # it is at work
    server.process.send_signal(signal.SIGINT)
    rest = server.process.stderr.read()
    assert server.process.wait(60) == 130 and rest.splitlines()[-1] == "modeling-encodec: interrupted"
    assert "Traceback" not in rest
    assert not list(server.temporary.iterdir())
