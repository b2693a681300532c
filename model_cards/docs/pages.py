"""What `make docs` makes beside the written pages: notebooks as pages, and the reference of every public module.

Modules are read where they lie when installed (pyproject.toml's `package-dir`), by links; none of them is imported.
"""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
PACKAGE = ROOT / "build" / "docs_source" / "modeling_encodec"
OUT_OF_THE_SITE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:modeling_encodec|processors|conversion|tests)/[^)]+\)")
FROM_THE_TOP = {"Changes": "CHANGELOG.md", "Contributing": "CONTRIBUTING.md"}


def on_startup(*, command, dirty) -> None:
    """Lay out the sources as they are when installed."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for path in [*(ROOT / "modeling_encodec").iterdir(), ROOT / "processors", ROOT / "conversion"]:
        (PACKAGE / path.name).symlink_to(path)


def on_config(config):
    """The navigation after the written pages: what is new is never forgotten."""
    cards = sorted(path.name for path in CARDS.glob("*.md") if path.name != "README.md")
    groups: dict[str, list] = {}
    for name in modules():
        group = name.rpartition(".")[0].partition(".")[2] or "codec"
        groups.setdefault(group, []).append({name.rpartition(".")[2]: f"reference/{name}.md"})
    config.nav += [
        {"Notebooks": [{title(path): page_of(path)} for path in notebook_paths()]},
        {"Model cards": [{Path(card).stem: card} for card in cards]},
        {"Reference": ["reference/index.md", *({group: pages} for group, pages in sorted(groups.items()))]},
        *({title: name} for title, name in FROM_THE_TOP.items()),
    ]
    return config


def on_files(files: Files, *, config) -> Files:
    """The pages that are made."""

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    for path in notebook_paths():
        files.remove(files.get_file_from_path(path.relative_to(CARDS).as_posix()))
        body, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
        for name, data in resources["outputs"].items():
            body = body.replace(f"]({name})", f"]({path.stem}_{name})")
            add(f"notebooks/{path.stem}_{name}", data)
        add(page_of(path), body)
    for name in modules():
        add(f"reference/{name}.md", f"# {name.rpartition('.')[2]}\n\n`{name}`\n\n::: {name}\n")
    add("reference/index.md", "\n".join(_index()))
    for name in FROM_THE_TOP.values():
        add(name, (ROOT / name).read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, **event) -> str:
    """Links as they are in the site: notebooks are pages, and source files are not there."""
    return OUT_OF_THE_SITE.sub(r"\1", markdown).replace(".ipynb)", ".md)")


def notebook_paths() -> list[Path]:
    """The notebooks, in their order."""
    return sorted((CARDS / "notebooks").glob("*.ipynb"))


def page_of(notebook: Path) -> str:
    """Where a notebook's page is in the site."""
    return f"notebooks/{notebook.stem}.md"


def title(notebook: Path) -> str:
    """A notebook's first heading."""
    return nbformat.read(notebook, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")


def modules() -> dict[str, str]:
    """Import name -> first paragraph about it, of every public module; of packages those that define something."""
    found = {}
    for path in _sources(PACKAGE):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        has_public = any(isinstance(node, ast.FunctionDef) and node.name[0] != "_" for node in tree.body)
        if "._" not in name and (path.stem != "__init__" or has_public):
            found[name] = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    return found


def _sources(folder: Path) -> Iterator[Path]:
    """Python files below a folder of links."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _index() -> Iterator[str]:
    """The names that the package root has, then the modules, each with the first line of its docstring."""
    import modeling_encodec

    yield "# Reference\n\n`from modeling_encodec import …`\n\n| name | module |\n|---|---|"
    for name, module in sorted(modeling_encodec._MODULES.items()):
        yield f"| [`{name}`][{module}.{name}] | [`{module}`]({module}.md) |"
    yield "\nEvery module:\n\n| module | |\n|---|---|"
    for name, about in modules().items():
        yield f"| [`{name}`]({name}.md) | {about.replace('|', '&#124;')} |"
