"""Every block of Python in README.md and the pages runs, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.pages import setting
from tests.pages.blocks import ROOT, blocks, pages, run
from tests.vision import make_importable

# It has a test of its own, with an empty folder and assertions on the outcome.
ELSEWHERE = {"docs/tutorial.md"}
NEEDS = {
    "docs/export.md": ("onnx", "onnxruntime"),
    "docs/any-bit.md": ("safetensors",),
    "docs/quantization.md": ("safetensors", "matplotlib"),
    "docs/how-to/lightning.md": ("lightning",),
}

IN_A_GROUP = {"docs/how-to/ddp.md", "docs/interoperability.md"}


def with_python() -> list[str]:
    found = [page.relative_to(ROOT).as_posix() for page in pages() if blocks(page, "python")]
    return [name for name in found if name not in ELSEWHERE]


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", with_python())
def test_the_blocks_of_a_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    make_importable()
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    if name in IN_A_GROUP:
        request.getfixturevalue("_one_rank")
    monkeypatch.chdir(tmp_path)
    names = setting.names()
    for block in blocks(ROOT / name, "python"):
        run(block, names)


def test_every_page_that_needs_something_is_there() -> None:
    assert ELSEWHERE | IN_A_GROUP | set(NEEDS) <= {page.relative_to(ROOT).as_posix() for page in pages()}
