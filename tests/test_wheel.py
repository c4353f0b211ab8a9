"""The wheel: what is in it, and that it works in an environment where nothing of the checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import gradl1_fast
from tests.full import FULL

pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
pytest.importorskip("pip", reason="installs the wheel")

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "csrc", "gradl1_fast")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"

USE = """
import pathlib, sys
import torch
import gradl1_fast as gl
assert pathlib.Path(gl.__file__).is_relative_to(sys.prefix), gl.__file__
model = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
penalty = gl.GradL1(model, lambda_w=0.1, lambda_a=0.1)
loss = model(torch.randn(16, 4)).square().mean()
(loss + penalty(loss)).backward()
print(gl.__version__, float(penalty.value) > 0, *sorted(penalty.terms))
"""


KINDS = {
    "pure": {"GRADL1_CUDA": "0", "GRADL1_HOST": "0"},
    "host": {"GRADL1_CUDA": "0", "GRADL1_HOST": "1"},
    "cuda": {"GRADL1_CUDA": "1", "GRADL1_HOST": "1", "GRADL1_CUDA_ARCHS": "90"},
}


FACTS = """
from gradl1_fast.backends.compiled import _extension
print("\\n".join(f"{name}: {value}" for name, value in _extension.describe().items()))
"""


def clean_environment() -> dict[str, str]:
    """Return the environment without what could lead to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GRADL1"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def run(*command: object, cwd: Path, **settings: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment() | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def built(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel, built from a copy of the sources as ``make wheel`` builds it."""
    folder = tmp_path_factory.mktemp("sources")
    without = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=without)
        else:
            shutil.copy(path, folder)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-c", BUILD, out, cwd=folder, **KINDS[kind])
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel of pure Python."""
    return built("pure", tmp_path_factory)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of commands of a new environment with the wheel of pure Python in it."""
    return environment(wheel, tmp_path_factory)


def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of commands of a new environment with the wheel in it.

    Torch and other packages are those of this environment. They come last on the path, and the .pth files
    beside them, which an editable installation leaves there, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return folder / "bin"


def test_a_wheel_without_extension_fits_every_platform(wheel: Path) -> None:
    assert wheel.name == f"gradl1_fast-{gradl1_fast.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "gradl1_fast"
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so")
    }
    info = f"gradl1_fast-{gradl1_fast.__version__}.dist-info"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(info)}
    assert {name for name in expected if not name.endswith(".py")} >= {
        "gradl1_fast/py.typed",
        "gradl1_fast/training/recipes/digits.toml",
    }
    assert names == expected


def test_the_wheel_names_its_licence_and_what_it_needs(wheel: Path) -> None:
    info = f"gradl1_fast-{gradl1_fast.__version__}.dist-info"
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ] == ["Requires-Dist: torch>=2.11"]
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_an_installed_wheel_trains_a_step(installed: Path, tmp_path: Path) -> None:
    words = run(installed / "python", "-c", USE, cwd=tmp_path).split()
    assert words == [gradl1_fast.__version__, "True", "0.weight", "2.input", "2.weight"]


def test_an_installed_wheel_has_the_command(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command needs it")
    pytest.importorskip("rich", reason="the command needs it")
    shown = run(installed / "gradl1", "info", cwd=tmp_path, COLUMNS="200")
    assert gradl1_fast.__version__ in shown
    assert "reference" in shown


@pytest.mark.skipif(not FULL, reason="compiling takes minutes: make full")
@pytest.mark.parametrize("kind", ["host", "cuda"])
def test_a_compiled_wheel_computes_where_it_is_installed(
    kind: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    if kind == "cuda" and not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    wheel = built(kind, tmp_path_factory)
    assert not wheel.name.endswith("any.whl")
    python = environment(wheel, tmp_path_factory) / "python"
    words = run(python, "-c", USE, cwd=tmp_path, GRADL1_BACKEND="host").split()
    assert words == [gradl1_fast.__version__, "True", "0.weight", "2.input", "2.weight"]
    facts = run(python, "-c", FACTS, cwd=tmp_path)
    assert ("CUDA architectures: 90" in facts) == (kind == "cuda")
