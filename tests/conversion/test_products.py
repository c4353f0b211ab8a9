"""The warning about multiply-adds in float."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl


class Attention(nn.Module):
    """A linear layer, and the product of its output with itself, ``size`` times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        return y @ y.transpose(-1, -2)


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.linear(x, self.other.weight))


@pytest.mark.parametrize(("model", "share"), [(Attention(), "80%"), (ByFunction(), "50%")])
def test_calibrate_warns_about_products_in_float(model: nn.Module, share: str) -> None:
    with pytest.warns(UserWarning, match=f"{share} of the multiply-adds stay in float"):
        gl.calibrate(gl.convert(model), [torch.randn(2, 16, 4)])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 5)),
    ],
)
def test_layers_of_this_library_give_no_warning(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.calibrate(gl.convert(nn.Sequential(nn.Conv2d(3, 4, 1), layer)), [torch.randn(2, 3, 8, 8)])
