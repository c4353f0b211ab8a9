"""Allowed imports between modules, read from the sources, and the effects of importing the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gradl1_fast"

# From the bottom up. A room imports from itself and from lower floors; rooms on one floor are strangers.
FLOORS = [
    {"_extras"},
    {
        "_checks",
        "_dtypes",
        "_files",
        "_json",
        "_masks",
        "_progress",
        "_version",
    },
    {"_environment", "_report", "_safetensors", "_shown"},
    {"backends"},
    {"ops"},
    {"functional"},
    {"nn"},
    {"penalty"},
    {"conversion"},
    {"quantization"},
    {"integrations"},
    {"training"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# These operators take their fakes from the reference: shapes and strides of PyTorch's convolution
# depend on device and layout in ways that only PyTorch itself knows.
BACKENDS_NAMED_IN_OPS = {
    "ops/conv.py": {"gradl1_fast.backends.reference"},
    "ops/linear.py": {"gradl1_fast.backends.reference"},
}

# Optional at run time; importing the package must need none of them.
OPTIONAL = (
    "typer", "rich", "matplotlib", "jinja2", "sklearn", "numpy", "onnx", "safetensors", "triton", "pybind11",
    "lightning", "msgspec", "tomli_w",
)  # fmt: skip


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return the full names of the modules of the package, or of what is in them, that a file imports."""
    names = set()
    here = ["gradl1_fast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level + 1], node.module] if node.level else [node.module or ""]
            names |= {".".join([*filter(None, base), alias.name]) for alias in node.names}
    return {name for name in names if name.split(".")[0] == "gradl1_fast"}


def room(module: str) -> str:
    """Return the room of a module of the package, written with dots."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if name in FLOOR else "__init__"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upward(path: Path) -> None:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert name in FLOOR, f"{name} has no place among the floors of this test"
    own = name
    for other in imported(path):
        target = room(other)
        assert target == own or FLOOR[target] < FLOOR[own], f"{own} must not import {other}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda p: p.name)
def test_operators_name_no_backend(path: Path) -> None:
    exceptions = BACKENDS_NAMED_IN_OPS.get(str(path.relative_to(PACKAGE)), set())
    backends = {p.name.removesuffix(".py") for p in (PACKAGE / "backends").iterdir()}
    named = {".".join(n.split(".")[:3]) for n in imported(path) if n.startswith("gradl1_fast.backends.")}
    assert {n for n in named if n.split(".")[2] in backends} == exceptions


def test_backends_do_not_use_autograd() -> None:
    for path in (PACKAGE / "backends").rglob("*.py"):
        assert "autograd" not in {
            node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
        }


def test_upward_imports_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    for number, line in enumerate(
        (
            "from gradl1_fast import nn",
            "from ..nn.layers import QConv2d",
            "import gradl1_fast.nn",
            "import gradl1_fast",
        )
    ):
        path = tmp_path / "ops" / f"guest{number}.py"
        path.write_text(f"def late():\n    {line}\n")
        with pytest.raises(AssertionError, match="ops must not import"):
            test_nothing_imports_upward(path)


def in_a_fresh_interpreter(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_package_needs_only_torch_and_uses_no_gpu() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import torch, gradl1_fast, gradl1_fast.functional
torch.randn(2, 3).sum()
print(torch.cuda.is_initialized(), gradl1_fast.functional.tap.__name__)
"""
    assert in_a_fresh_interpreter(code) == "False tap"


def test_the_package_imports_nothing_optional_and_starts_no_process() -> None:
    code = f"""
import subprocess, sys, torch
before = set(sys.modules)
subprocess.Popen = None
import gradl1_fast
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] in {OPTIONAL}))
"""
    assert in_a_fresh_interpreter(code) == "[]"
