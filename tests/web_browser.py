"""The web page in a real browser: the server as a process of its own, Chromium by Playwright, what users do there.

`python tests/web_browser.py PICTURE.png` takes the README's picture.
"""

import contextlib
import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from modeling_encodec.demo.web.page import FIND_AUDIO


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required")
MEASURE = f"""async (id) => {{
  const element = ({FIND_AUDIO})(id);
  const bytes = await (await fetch(element.src)).arrayBuffer();
  const audio = await new OfflineAudioContext(1, 1, 24000).decodeAudioData(bytes);
  const samples = audio.getChannelData(0);
  const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
  const peak = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
  return {{seconds: element.duration, samples: samples.length, rms: Math.sqrt(power), peak}};
}}"""


@contextlib.contextmanager
def served(*options: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """The page's address and the process, which is ended at last if it still runs."""
    command = [sys.executable, "-m", "modeling_encodec", "demo", "--serve", "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if "http://" in line:
                    yield next(word for word in line.split() if word.startswith("http://")), process
                    break
            else:
                raise AssertionError(f"the page was not served: {said}")
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.stderr.read()


@contextlib.contextmanager
def chromium(*options: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *options])
        yield browser
        browser.close()


def new_user(browser: Browser) -> BrowserContext:
    return browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")


def open_page(user: BrowserContext, address: str, asked: list[str]) -> Page:
    """The page in a new tab; the addresses that it asks for are added to `asked`."""
    page = user.new_page()
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#encode")
    return page


def clear(page: Page, place: str) -> None:
    """Take away the file that is there, if any."""
    button = page.locator(f"#{place} [aria-label=Clear]:visible")
    if button.count():
        button.first.click()


def upload(page: Page, place: str, path: Path) -> None:
    """Put a file where `place`, clip or file, takes one, and wait until it is there."""
    clear(page, place)
    with page.expect_response(lambda response: "/upload" in response.url):
        page.set_input_files(f"#{place} input[type=file]", path)
    page.wait_for_timeout(500)


def encode(page: Page, path: Path, bandwidth: str, with_lm: bool) -> None:
    """A clip through the first tab, until its results are there."""
    upload(page, "clip", path)
    page.locator("#bandwidth label").get_by_text(bandwidth, exact=True).click()
    page.locator("#lm input").set_checked(with_lm)
    page.click("#encode")
    page.wait_for_selector(f"#coded-facts :text('{path.name}')")
    for player in ("original", "decoded"):
        page.wait_for_function(f"(id) => ({FIND_AUDIO})(id)?.duration > 0", arg=player)


def message(page: Page) -> str:
    """The one message that the page shows, which is then closed."""
    toast = page.locator("[data-testid=toast-body]")
    toast.first.wait_for()
    text = toast.first.inner_text()
    page.locator("[data-testid=toast-close]").first.click()
    toast.first.wait_for(state="detached")
    return text


def take_picture(target: str) -> None:
    """The README's: the bundled speech clip, coded."""
    from PIL import Image

    from modeling_encodec.demo.table import demo_clips

    with served() as (address, _), chromium() as browser:
        page = open_page(new_user(browser), address, [])
        encode(page, demo_clips()[0], "6", True)
        page.wait_for_function(
            "[...document.querySelectorAll('.picture img')].filter((i) => i.naturalWidth).length == 2"
        )
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    shot.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    take_picture(sys.argv[1])
