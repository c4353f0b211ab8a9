"""Classes that require a version to load a state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.loop.optimization import Average
from gradl1_fast.training.runs.weights_file import load_weights, save_weights


class Versioned(nn.Sequential):
    """Refuses a state dict without a version, as MNASNet of torchvision does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != self._version:
            raise ValueError(f"version should be {self._version}, not {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def by_any_bit_file(model: nn.Module, other: nn.Module, path: Path) -> None:
    gl.save_any_bit(model, path)
    gl.load_any_bit(other, path, w=8)


def by_weights_file(model: nn.Module, other: nn.Module, path: Path) -> None:
    save_weights(model.state_dict(), path)
    load_weights(other, path)


def by_averages(model: nn.Module, other: nn.Module, _path: Path) -> None:
    with Average(model, 0.9).applied(other):
        assert torch.equal(other[1].weight, model[1].weight)


@pytest.mark.parametrize("way", [by_any_bit_file, by_weights_file, by_averages])
def test_a_class_that_requires_its_version_can_be_loaded(way: Any, tmp_path: Path) -> None:
    model, other = (gl.convert(Versioned(nn.Linear(4, 4), nn.BatchNorm1d(4))).eval() for _ in range(2))
    nn.init.uniform_(model[1].weight)
    way(model, other, tmp_path / "file.safetensors")
