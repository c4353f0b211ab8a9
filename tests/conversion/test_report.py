"""The report names every layer and site, what stays in float, and the plans."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from tests.conversion import models
from tests.conversion.lookalikes import GPT, OF_IMAGES
from tests.conversion.models import NOT_PLANNED, Base
from tests.conversion.runs import built, images
from tests.networks import MOBILENET, NETWORKS, VGG, Network, layers


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.id)
def test_every_layer_and_site_has_a_row(network: Network) -> None:
    plain = network.make()
    converted = gl.convert(plain)
    result = gl.report(converted)
    assert [row[0] for row in result.layers] == layers(plain)
    assert [row[0] for row in result.sites] == list(named_quantizers(converted))
    assert [row[-1] for row in result.sites].count("no: network input") == 1
    shown = str(result)
    assert all(name in shown for name, *_ in (*result.layers, *result.sites))
    assert repr(result) == shown


def test_rows_show_bits_and_ranges() -> None:
    model = gl.convert(VGG.make(), per_channel=True)
    gl.calibrate(model, [torch.ones(2, 3, 8, 8).double()])
    gl.set_bits(model, w=4, a=None)
    result = gl.report(model)
    assert result.layers[0] == ("0", "QConv2d", "4x3x3x3", "4", "per channel")
    assert ("0.input", "float", "0 to 1", "no: network input") in result.sites or (
        "0.input",
        "float",
        "1 to 1",
        "no: network input",
    ) in result.sites


def test_operations_left_in_float_are_listed() -> None:
    kinds = [kind for _, kind in gl.report(gl.convert(VGG.make())).unquantized]
    assert kinds.count("MaxPool2d") == 2
    kinds = [kind for _, kind in gl.report(gl.convert(MOBILENET.make())).unquantized]
    assert {"mul", "add", "AdaptiveAvgPool2d", "flatten"} <= set(kinds)


def test_a_single_layer() -> None:
    result = gl.report(gl.convert(nn.Linear(3, 2)))
    assert result.layers == [("", "QLinear", "2x3", "float", "per tensor")]
    assert "Left in float: none" in str(result)


class Products(nn.Module):
    """Matrix products of activations, in a model that has a graph and in one that has none."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor], branch: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.product, self.branch = product, branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.sum() < -1e9:
            return x
        return PRODUCTS_CALLED[self.product](self.a(x), self.b(x))


PRODUCTS_CALLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda a, b: torch.matmul(a, b),
    "softmax": lambda a, b: torch.softmax(a, -1) + b,
    "bmm": lambda a, b: torch.bmm(a, b),
    "einsum": lambda a, b: torch.einsum("bij,bjk->bik", a, b),
    "scaled_dot_product_attention": lambda a, b: F.scaled_dot_product_attention(a, b, b),
}


@pytest.mark.parametrize("product", PRODUCTS_CALLED)
def test_products_of_activations_are_named(product: str) -> None:
    result = gl.report(gl.convert(Products(product, branch=False)))
    assert any(product in kind for _, kind in result.unquantized), result.unquantized


class WithoutGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        weights = torch.matmul(a, b.transpose(-1, -2)).softmax(-1)
        return torch.bmm(weights, b) if x.sum() > -1e9 else F.scaled_dot_product_attention(a, b, b)


class WithOperator(nn.Module):
    """A matrix product by the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.b(x) if x.sum() > -1e9 else x


def test_products_are_named_in_a_model_that_cannot_be_traced() -> None:
    unquantized = gl.report(gl.convert(WithoutGraph())).unquantized
    kinds = {kind for _, kind in unquantized}
    assert {"matmul", "softmax", "bmm", "scaled_dot_product_attention"} <= kinds
    assert any("unknown" in kind for kind in kinds)
    assert ("the model", "matmul") in gl.report(gl.convert(WithOperator())).unquantized
    assert "Left in float: none" not in str(gl.report(gl.convert(WithOperator())))


@pytest.mark.parametrize("model", [GPT, OF_IMAGES["encoder"]], ids=["gpt", "encoder"])
def test_attention_is_named(model: Callable[[], nn.Module]) -> None:
    kinds = [kind for _, kind in gl.report(gl.convert(model())).unquantized]
    assert "scaled_dot_product_attention" in kinds


class Functional(Base):
    """Its first convolution is used by function."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.branch = branch

    def features(self, x: Tensor) -> Tensor:
        if self.branch and x.sum() < -1e9:
            return x
        return self.conv2(F.conv2d(x, self.conv1.weight, self.conv1.bias, padding=1))


class FusedProjection(nn.Module):
    """As timm's attention: a bias that is put together, and a weight by function."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.branch = nn.Linear(5, 15, bias=False), nn.Linear(5, 4), branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.sum() < -1e9:
            return x
        q, k, v = F.linear(x, weight=self.qkv.weight).chunk(3, -1)
        return self.proj(q * k * v)


BY_FUNCTION = {"convolution": (Functional, "conv1"), "linear": (FusedProjection, "qkv")}


@pytest.mark.parametrize("kind", BY_FUNCTION)
@pytest.mark.parametrize("branch", [False, True], ids=["traced", "not traced"])
def test_a_weight_used_by_function_is_not_reported_as_quantized(kind: str, branch: bool) -> None:
    cls, name = BY_FUNCTION[kind]
    converted = gl.convert(built(lambda: cls(branch), training=False))
    gl.calibrate(converted, [images()])
    gl.set_bits(converted, w=2, a=None)
    rows = {row[0]: row[3] for row in gl.report(converted).layers}
    converted.get_submodule(name).weight_quantizer.bits = None
    before = converted(images())
    converted.get_submodule(name).weight_quantizer.bits = 2
    is_quantized = not torch.equal(converted(images()), before)
    assert is_quantized or rows[name] != "2"


def test_reasons_of_plans() -> None:
    ((name, count, state),) = gl.report(gl.convert(NOT_PLANNED["data_dependent"]())).plans
    assert (name, count) == ("", 3)
    assert state.startswith("not planned: ")
    assert "control flow" in state
    ((name, count, state),) = gl.report(gl.convert(models.model(models.functional_relu))).plans
    assert (name, count, state) == ("", 3, "")
    hooked = gl.convert(models.model(models.functional_relu))
    hooked.conv1.register_forward_hook(lambda *_: None)
    gl.GradL1(hooked, 0.1, 0.1)(hooked(images().float()).sum())
    assert "has hooks" in gl.report(hooked).plans[0][2]


def test_a_report_changes_nothing() -> None:
    converted = gl.convert(VGG.make())
    before = (str(converted), list(converted.state_dict()), sorted(vars(converted)))
    gl.report(converted)
    assert (str(converted), list(converted.state_dict()), sorted(vars(converted))) == before
