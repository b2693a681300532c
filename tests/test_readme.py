"""The README is true: its commands are run, one after another as they stand, and the guide's are understood."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import soundfile
from written_pages import PAGES, ROOT, blocks, commands

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.cli import app, main
from modeling_encodec.demo.table import demo_clips


README = PAGES["README.md"]
RECIPE = """
model = "{model}"
epochs = 1
updates_per_epoch = 2
batch_size = 2
workers = 0
adversarial_weight = 0.0
feature_weight = 0.0
device = "cpu"
"""
LM_RECIPE = """
codec = "{model}"
hidden_size = 16
num_attention_heads = 2
num_hidden_layers = 1
intermediate_size = 32
epochs = 1
updates_per_epoch = 2
batch_size = 2
segment_seconds = 1.0
workers = 0
device = "cpu"
"""
CORPUS = """
[[corpora]]
name = "mine"
source = "recordings"
kind = "folder"
domain = "general"
licence = "mine"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, small_models) -> Path:
    """Where somebody might stand who tries the README: with audio and recipes of the names it uses."""
    (tmp_path / "recordings").mkdir()
    for clip in demo_clips():
        audio, rate = soundfile.read(clip)
        for copy in ("a", "b"):
            soundfile.write(tmp_path / "recordings" / f"{clip.stem}_{copy}.wav", audio, rate)
    audio = audio[:48000]
    soundfile.write(tmp_path / "in.wav", audio, rate)
    soundfile.write(tmp_path / "in.pcm", audio, rate, format="RAW", subtype="PCM_16")
    for name, text in (("my_recipe.toml", RECIPE), ("my_lm_recipe.toml", LM_RECIPE)):
        (tmp_path / name).write_text(text.format(model=bundled_checkpoint()) + CORPUS)
    small_models["24khz"].save_pretrained(tmp_path / "my_codec")
    if shutil.which("ffmpeg"):
        quiet = ["ffmpeg", "-loglevel", "error", "-i", "in.wav"]
        subprocess.run([*quiet, "talk.mp4"], cwd=tmp_path, check=True, timeout=60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_commands() -> list[str]:
    return [
        command for place, code in blocks("sh").items() if place.startswith("README.md") for command in commands(code)
    ]


@pytest.mark.slow
def test_the_slow_commands_of_the_readme_run(folder):
    for command in filter(is_slow, readme_commands()):
        assert main(shlex.split(command)[1:]) == 0, command
    assert (folder / "onnx_files" / "encoder_step.onnx").exists()


def is_slow(command: str) -> bool:
    """Exports take most of a minute; tests/test_export.py has a quicker one."""
    return command.startswith("modeling-encodec export onnx")


def test_every_command_of_the_readme_runs(folder):
    done = []
    for command in readme_commands():
        if is_slow(command):
            continue
        if command.startswith("make "):
            check_targets(command)
        elif command == "modeling-encodec demo --serve":
            serve()
        elif command.startswith("ffmpeg") and shutil.which("ffmpeg") is None:
            continue
        elif re.search(r"[|<>]", command):
            in_a_shell(command)
        else:
            assert main(shlex.split(command)[1:]) == 0, command
        done.append(command)
    assert len(done) > 20
    for made in ("out.ecdc", "back.wav", "coded/speech_a.ecdc", "old.ecdc", "talk.ecdc", "beside.png", "mine.th"):
        assert (folder / made).stat().st_size, made
    for made in ("runs/mine/model", "runs/lm/model", "tokens/manifest.json"):
        assert (folder / made).exists(), made
    assert (folder / "scores" / "evaluation.json").exists()
    length = (folder / "in.pcm").stat().st_size
    assert (folder / "out.pcm").stat().st_size == pytest.approx(length, abs=2 * 320)  # whole frames


def in_a_shell(command: str) -> None:
    place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=os.environ | {"PATH": place},
        stderr=subprocess.PIPE,
        timeout=120,
    )
    assert done.returncode == 0, (command, done.stderr)


def serve() -> None:
    """Until it says where it is; then Ctrl-C."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "modeling_encodec", "demo", "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://127.0.0.1:" in line:
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130 and "http://127.0.0.1:" in said[-1], said


def check_targets(command: str) -> None:
    """The targets are there and what they would run is known; `make test` cannot run itself."""
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, (command, done.stderr)


# What groups of commands do without the name of one.
DEFAULTS = {"evaluate": "metrics", "tokenize": "corpus"}


@pytest.mark.parametrize("place", blocks("sh"))
def test_every_command_is_understood(place):
    """Its name, arguments and options are there; the README's are run above."""
    from typer.main import get_command

    for line in commands(blocks("sh")[place]):
        for part in re.split(r"\||<|>", line):
            words = shlex.split(part)
            if words[0] == "torchrun":
                words = words[words.index("-m") + 1 :]
                assert words[0] == "modeling_encodec"
            if words[:2] == ["pip", "install"]:
                check_extra(words[-1])
            elif words[0] == "make":
                check_targets(part)
            elif words[:2] == ["python", "-m"]:
                module = words[2].split(".")
                assert module[0] == "modeling_encodec"
                assert (ROOT.joinpath(*module).with_suffix(".py")).is_file(), line
            elif words[-1] == "--help":
                assert words[1] in get_command(app).commands, line
            elif words[0] in ("modeling-encodec", "modeling_encodec"):
                command, words, context = get_command(app), words[1:], None
                while hasattr(command, "commands"):
                    name = words[0] if words[0] in command.commands else None
                    assert name or command.name in DEFAULTS, line
                    context = command.make_context(command.name, list(words), parent=context)
                    command, words = command.commands[name or DEFAULTS[command.name]], words[1:] if name else words
                command.make_context(command.name, list(words), parent=context)
            else:
                assert words[0] in ("ffmpeg", "in.pcm", "out.pcm", "talk.ecdc"), line


def check_extra(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, _, extras = package.rstrip("]").partition("[")
    assert name == project["name"] and set(extras.split(",")) <= set(project["optional-dependencies"]), package


def test_the_readme_names_every_folder():
    tree = README.split("## Files")[1].split("##")[0]
    folders = [path.parent for path in (ROOT / "modeling_encodec").glob("*/__init__.py")]
    folders += [ROOT / name for name in ("modeling_encodec", "processors", "conversion", "model_cards", "tests")]
    for folder in folders:
        assert f"{folder.name}/ " in tree, f"{folder.name} is missing from the README's file tree"


def test_every_command_is_in_the_readme():
    from typer.main import get_command

    used = set(re.findall(r"modeling-encodec ([\w-]+)", README))
    assert used == set(get_command(app).commands)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        assert target.startswith("https://") or ((ROOT / page).parent / path).exists(), target
        assert not anchor, f"{target}: nothing checks what stands after #"
