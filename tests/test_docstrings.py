"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from tests.vision import make_importable

PACKAGE = Path(__file__).parent.parent / "gradl1_fast"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NEEDS = {"gradl1_fast.integrations.lightning": "lightning", "gradl1_fast.quantization.any_bit": "safetensors"}


def with_examples() -> list[str]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in files]
    return [".".join(each).removesuffix(".__init__") for each in parts]


@pytest.mark.parametrize("name", with_examples())
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        make_importable()
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.attempted, "none of its examples is in a docstring"
    assert not result.failed, "see the captured output"
