"""The site of guide, notebooks, cards and reference: built with warnings as errors, whole, of this machine alone."""

import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from filelock import FileLock
from written_pages import CARDS, ROOT

import modeling_encodec


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for package in ("material", "mkdocstrings_handlers.python", "nbconvert"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    config = CARDS / "docs" / "mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    with FileLock(tmp_path_factory.getbasetemp().parent / "site.lock"):  # another worker may build it too
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, what it loads, and what may be linked to in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.ids, self.text = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found["id"]} if found.get("id") else set()
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        for name in ("src", "href"):
            if found.get(name) and (tag in ("script", "img", "audio", "source") or tag == "link"):
                self.loaded.append(found[name])

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_to_a_page_and_a_place_in_it(site, pages):
    assert len(pages) > 80
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists() and target.is_relative_to(site.resolve()), (path, link)
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].ids, (path, link)


def test_nothing_is_loaded_from_elsewhere(pages):
    for path, page in pages.items():
        assert [url for url in page.loaded if urlsplit(url).scheme not in ("", "data")] == [], path


def test_every_public_module_and_root_name_has_its_place(site, pages):
    index = pages[(site / "reference" / "index.html").resolve()]
    for name, module in modeling_encodec._MODULES.items():
        assert name in index.text
        assert f"{module}.{name}" in pages[(site / "reference" / f"{module}.html").resolve()].ids, name
    for folder, package in (("modeling_encodec", ""), ("processors", ".processors"), ("conversion", ".conversion")):
        for path in (ROOT / folder).rglob("*.py"):
            if not path.name.startswith("_"):
                inner = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
                assert (site / "reference" / f"modeling_encodec{package}.{inner}.html").is_file(), path


def test_written_pages_notebooks_and_cards_are_in_the_site(site):
    for path in CARDS.rglob("*.md"):
        if path != CARDS / "README.md":
            assert (site / path.relative_to(CARDS).with_suffix(".html")).is_file(), path
    for path in CARDS.glob("notebooks/*.ipynb"):
        html = (site / "notebooks" / f"{path.stem}.html").read_text()
        assert "<img" in html and str(ROOT) not in html, path


def test_version_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    changes = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert citation["version"] == project["version"] == modeling_encodec.__version__ == changes[0]
    assert citation["license"] == project["license"]


def test_every_test_that_the_page_on_faults_names_is_there():
    named = set(re.findall(r"test_\w+", (CARDS / "docs" / "faults.md").read_text()))
    files = {path.stem: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    there = set(files) | set(re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.MULTILINE))
    assert len(named) > 40 and not named - there
