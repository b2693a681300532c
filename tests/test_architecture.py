"""Who imports whom: downwards only, and files that travel to the Hub import nothing that does not."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import modeling_encodec


ROOT = Path(__file__).parents[1]
# From the ground up: a folder imports from those before it alone. README.md says what each is for.
FOLDERS = (
    *("system", "models", "checkpoints", "streaming", "bitstream", "processors", "evaluation", "conversion"),
    *("training", "demo", "doctor", "examples", "commands"),
)
# Beside the folders: what brings them together.
ROOT_MODULES = {"__init__", "__main__", "auto_classes", "cli"}
SOURCES = {
    **{path.relative_to(ROOT / "modeling_encodec"): path for path in (ROOT / "modeling_encodec").rglob("*.py")},
    **{
        path.relative_to(ROOT): path
        for folder in ("processors", "conversion")
        for path in (ROOT / folder).rglob("*.py")
    },
}


def module_name(relative: Path) -> str:
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(relative) for relative in SOURCES}


def imports_of(relative: Path) -> list[tuple[str, int]]:
    """(module, level) of every import of ours, wherever in the file."""
    path, found = SOURCES[relative], []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("modeling_encodec")):
            module = (node.module or "").removeprefix("modeling_encodec").lstrip(".")
            if node.level == 1 and node.module:
                module = ".".join([*relative.parent.parts, node.module])
            modules = [f"{module}.{name.name}" for name in node.names if f"{module}.{name.name}" in MODULES]
            found += [(target, node.level) for target in modules or [module]]
        elif isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] in ("processors", "conversion") for name in node.names), path
    return found


def test_folders_import_downwards():
    for relative in SOURCES:
        folder = relative.parts[0].removesuffix(".py")
        if folder in ROOT_MODULES:
            continue
        for target, _ in imports_of(relative):
            other = target.split(".")[0]
            assert FOLDERS.index(other) <= FOLDERS.index(folder), f"{relative} imports {target}"


def test_modules_have_no_cycle():
    graph = {module_name(relative): {target for target, _ in imports_of(relative)} for relative in SOURCES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_readme_names_the_folders_in_their_order():
    readme = (ROOT / "README.md").read_text()
    assert " · ".join(FOLDERS) in readme


def test_files_for_the_hub_import_only_siblings():
    """Files of these names travel, and with them what they import, into one flat folder."""
    travelling = [relative for relative in SOURCES if relative.stem.endswith("_encodec")]
    for relative in travelling:
        for target, level in imports_of(relative):
            sibling = Path(*target.split(".")).with_suffix(".py")
            assert level == 1 and sibling in SOURCES, f"{relative} imports {target}"
            assert sibling.parent == relative.parent, f"{relative} imports {target}"
            travelling += [sibling] if sibling not in travelling else []
    assert Path("processors/code_layouts.py") in travelling
    texts = {(relative.name, SOURCES[relative].read_text()) for relative in travelling}
    assert len({name for name, _ in texts}) == len(texts)  # files of one name are the same


def test_public_names_are_sorted_real_and_lazy():
    assert modeling_encodec.__all__ == sorted(modeling_encodec.__all__)
    for name in modeling_encodec.__all__:
        assert getattr(modeling_encodec, name).__doc__
    code = "import sys, modeling_encodec; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_and_public_function_is_documented():
    for path in SOURCES.values():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
