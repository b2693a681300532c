"""The wheel, installed where nothing else of the project is, runs what README and guide say in Python."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from written_pages import ROOT, blocks


@pytest.fixture(scope="module")
def installed_python(tmp_path_factory) -> Path:
    """Python of a new virtual environment with the wheel and, by path, the dependencies of this one.

    Only the folder is put on its path: editable installs, which need their .pth file run, stay out of sight.
    """
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: building leaves files in the source tree, and tests run side by side.
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run(build, check=True, cwd=folder, timeout=300)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    paths = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    )
    site = Path(paths.stdout.strip())
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True, timeout=300)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


@pytest.mark.parametrize("place", blocks("python"))
def test_written_code_runs_from_the_installed_wheel(place, installed_python, tmp_path):
    check = f"import modeling_encodec; assert {str(ROOT)!r} not in modeling_encodec.__file__\n"
    code = check + blocks("python")[place]
    done = subprocess.run([installed_python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


def test_installed_command_line_runs(installed_python, tmp_path):
    command = [installed_python, "-m", "modeling_encodec", "demo", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "speech" in done.stdout, done.stderr


def test_the_installed_package_writes_cards(installed_python, tmp_path):
    checkpoint = "from modeling_encodec import bundled_checkpoint as b; print(b())"
    folder = subprocess.run([installed_python, "-c", checkpoint], capture_output=True, text=True, check=True)
    command = [installed_python, "-m", "modeling_encodec", "push", folder.stdout.strip(), "me/codec", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "README.md" in done.stdout, done.stderr  # from templates that have to be there


def test_only_one_name_is_installed(installed_python):
    site = next((installed_python.parents[1] / "lib").glob("python*/site-packages"))
    names = {path.name for path in site.iterdir() if not path.name.endswith((".dist-info", ".pth"))}
    assert names - {"__pycache__", "bin"} == {"modeling_encodec"}
