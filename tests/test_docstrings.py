"""Docstrings: every public name has one, root names with arguments, errors and an example; all examples run."""

import ast
import builtins
import dataclasses
import doctest
import importlib
import inspect
import logging
import re
import textwrap
from pathlib import Path

import pytest
import torch
from test_architecture import SOURCES

import modeling_encodec


ROOT = Path(__file__).parents[1]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Errors that a caller can cause and so has to know of.
USER_ERRORS = {
    *("ValueError", "TypeError", "FileNotFoundError", "FileExistsError", "ImportError", "RuntimeError", "OSError"),
    *("PermissionError", "NotImplementedError", "KeyError", "IndexError"),
}

SECTIONS = {"Args": "parameters", "Returns": "returns", "Raises": "raises", "Examples": "examples"} | {
    "Attributes": "attributes", "Yields": "yields", "Example": "examples",
}  # fmt: skip


def modules() -> list[str]:
    """Installed names of all modules of the package, of those in the other two folders too."""
    names = []
    for relative in SOURCES:
        parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
        if parts[-1:] != ["__main__"]:
            names.append(".".join(["modeling_encodec", *parts]))
    return sorted(names)


def imported(name: str):
    """A module; skips where a package that only it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("modeling_encodec"):
            raise
        pytest.skip(f"{name} needs {error.name}")


def defined_in(owner, module) -> dict[str, object]:
    """What a module or class itself defines of functions, classes and properties, by name, if it is public."""
    found = {}
    for name, value in vars(owner).items():
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        value = value.fget if isinstance(value, property) else value
        value = inspect.unwrap(value) if callable(value) else value
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if value.__module__ == module.__name__ and value.__name__ == name:
            found[name] = value
    return found


def public_names(module) -> dict[str, object]:
    """Functions, classes, methods and properties of a module, by their qualified names."""
    found = {}
    for name, value in defined_in(module, module).items():
        found[name] = value
        if inspect.isclass(value):
            found |= {f"{name}.{inner}": method for inner, method in defined_in(value, module).items()}
    return found


def has_docstring(value, name: str, module) -> bool:
    """Its own; a method may have that of the class whose contract it follows."""
    owner, _, method = name.rpartition(".")
    bases = getattr(module, owner).__mro__ if owner else ()
    return bool(value.__doc__ or any(getattr(vars(base).get(method), "__doc__", None) for base in bases))


@pytest.mark.parametrize("name", modules())
def test_every_public_name_is_documented(name):
    module = imported(name)
    missing = [inner for inner, value in public_names(module).items() if not has_docstring(value, inner, module)]
    assert module.__doc__ or not Path(module.__file__).read_text().strip()
    assert missing == []


def test_public_names_are_found():
    """Of a module of each folder: functions, classes, methods, properties."""
    for module, name in (
        ("bitstream.container", "Header.raw_size"),
        ("processors.audio", "read_audio"),
        ("conversion.convert", "Report.add"),
        ("streaming.streams", "StreamingEncoder.latency"),
    ):
        assert name in public_names(importlib.import_module(f"modeling_encodec.{module}"))
    assert len(modules()) > 100


# ---- names exported from the root ----------------------------------------------------------------------------------


def described(value) -> str:
    """A function's docstring; of a class, its own and that of `__init__`."""
    own = inspect.getdoc(value) or ""
    if inspect.isclass(value) and "__init__" in vars(value):
        own += "\n\n" + inspect.cleandoc(value.__init__.__doc__ or "")
    return own


def parameters(value) -> list[str]:
    """Names of the parameters that a caller of a function or class gives."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in own_fields(value)]
    function = value.__init__ if inspect.isclass(value) else value
    every = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in every if one.name not in ("self", "cls") and one.kind not in kinds]


def own_fields(value) -> list[dataclasses.Field]:
    """The fields of a dataclass that classes of this package define, not those of Transformers' configurations."""
    ours = [base for base in value.__mro__ if base.__module__.startswith("modeling_encodec")]
    names = {name for base in ours for name in inspect.get_annotations(base)}
    return [field for field in dataclasses.fields(value) if field.name in names]


def entries(doc: str, *titles: str) -> set[str]:
    """Names that sections of these titles begin their lines with, `a` and `b` of "a, b: ..." alike."""
    found = set()
    for block in re.findall(rf"^(?:{'|'.join(titles)}):\n((?: {{4}}.*\n|\n)*)", doc + "\n", re.MULTILINE):
        for line in re.findall(r"^ {4}(\w[\w, ]*?)(?: \(.*\))?:", block, re.MULTILINE):
            found |= {name.strip() for name in line.split(",")}
    return found


def root_names() -> dict[str, object]:
    """The functions and classes of the package root, and the public methods that these classes define."""
    found = {}
    for name in modeling_encodec.__all__:
        value = getattr(modeling_encodec, name)
        found[name] = value
        if inspect.isclass(value):
            module = importlib.import_module(value.__module__)
            for base in value.__mro__:
                if base.__module__ == value.__module__:
                    found = {f"{name}.{n}": m for n, m in defined_in(base, module).items()} | found
    return found


def test_every_parameter_of_root_names_is_described():
    missing = []
    for name, value in root_names().items():
        doc = described(value)
        named = entries(doc, "Args", "Attributes") | set(re.findall(r"`\**(\w+)[`=]", doc))
        if dataclasses.is_dataclass(value):
            named |= {field.name for field in own_fields(value) if field.metadata.get("help")}
        missing += [f"{name}({one})" for one in parameters(value) if one not in named]
    assert missing == []


def test_every_root_name_has_an_example():
    parser = doctest.DocTestParser()
    names = modeling_encodec.__all__
    assert [name for name in names if not parser.get_examples(described(getattr(modeling_encodec, name)))] == []


def test_errors_that_root_names_raise_are_named():
    """Classes of errors in the body itself; what the functions called raise is left to the eye."""
    missing = []
    for name, value in root_names().items():
        function = vars(value).get("__init__") if inspect.isclass(value) else value
        if dataclasses.is_dataclass(value):
            function = vars(value).get("__post_init__")
        if function is None:
            continue
        doc = described(value)
        # Methods may name them in their text, functions and classes have a section.
        named = set(re.findall(r"\w+Error", doc)) if "." in name else entries(doc, "Raises")
        missing += [f"{name}: {error}" for error in sorted(raised(function) & USER_ERRORS - named)]
    assert missing == []


def raised(function) -> set[str]:
    """Names of the exception classes in a function's `raise` statements."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    made = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {ast.unparse(one.func if isinstance(one, ast.Call) else one) for one in made}
    return {name for name in names if hasattr(builtins, name)}


def test_docstrings_parse_as_google_style():
    """As mkdocstrings reads them: no warnings, and every section that is begun is one."""
    griffe = pytest.importorskip("griffe", reason="griffe is not installed")
    problems = []

    class Keep(logging.Handler):
        def emit(self, record):
            problems.append(record.getMessage())

    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser=griffe.Parser.google)
    packages = [loader.load(name) for name in ("modeling_encodec", "processors", "conversion")]
    keep = Keep(logging.WARNING)
    logging.getLogger("griffe").addHandler(keep)
    try:
        for docstring in [docstring for package in packages for docstring in docstrings_of(package)]:
            kinds = {section.kind.value for section in docstring.parsed}
            begun = set(re.findall(rf"^\s*({'|'.join(SECTIONS)}):$", docstring.value, re.MULTILINE))
            problems += [
                f"{docstring.parent.path}: {title} is no section" for title in begun if SECTIONS[title] not in kinds
            ]
    finally:
        logging.getLogger("griffe").removeHandler(keep)
    assert problems == []


def docstrings_of(thing) -> list:
    """The docstrings of a griffe object and of what it holds, aliases left out."""
    found = [thing.docstring] if thing.docstring else []
    if thing.is_module or thing.is_class:
        found += [one for member in thing.members.values() if not member.is_alias for one in docstrings_of(member)]
    return found


# ---- examples and form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", modules())
def test_examples_run(name, tmp_path, monkeypatch):
    """Each docstring in a fresh namespace, in an empty folder."""
    module = imported(name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    report = []
    for index, test in enumerate(doctest.DocTestFinder().find(module, name, globs={})):
        if not test.examples:
            continue
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        torch.manual_seed(0)
        runner.run(test, out=report.append, clear_globs=True)
    assert runner.failures == 0, "\n".join(report)
