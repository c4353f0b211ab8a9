"""The penalty applies to the gradient of a computed weight as the forward pass used it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import gradl1_fast as gl
from tests import oracle
from tests.penalty.small import Loss, assert_same, curved, data, linears, ours

Change = Callable[[nn.Module], object]


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight.tanh()


def tripled(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Tripled())


def pruned(layer: nn.Module) -> None:
    mask = torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 3 > 0
    prune.custom_from_mask(layer, "weight", mask)


COMPUTED: dict[str, Change] = {
    "weight_norm": nn.utils.weight_norm,
    "weight_norm, parametrized": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm, parametrized": parametrizations.spectral_norm,
    "pruned": pruned,
    "parametrized": tripled,
}
LAMBDAS = {"weights": (0.3, 0.0), "activations": (0.0, 0.2), "both": (0.3, 0.2)}
# The hooks of weight_norm warn that they are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


def changed(change: Change) -> nn.Module:
    """Return the network with a computed weight in its second layer.

    In evaluation mode a spectral norm keeps its vectors.
    """
    model = linears()
    torch.manual_seed(5)
    change(model[2])
    return model.eval()


def truth(
    plain: nn.Module, lambdas: tuple[float, float], loss: Loss = curved, **options: Any
) -> oracle.Penalised:
    return oracle.penalised_gradients(
        lambda: oracle.measure(plain, loss, weights=["0.weight", "2.weight"], inputs_of=["2"]),
        dict(plain.named_parameters()),
        lambda_w=lambdas[0],
        lambda_a=lambdas[1],
        **options,
    )


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("scale", ["none", "step"])
@pytest.mark.parametrize("lambdas", LAMBDAS)
@pytest.mark.parametrize("case", COMPUTED)
def test_equal_to_double_backprop_on_the_computed_tensor(
    case: str, lambdas: str, scale: str, per_channel: bool
) -> None:
    plain = changed(COMPUTED[case])
    model = gl.convert(plain, per_channel=per_channel)
    penalty = gl.GradL1(model, *LAMBDAS[lambdas], scale)
    expected = truth(changed(COMPUTED[case]), LAMBDAS[lambdas], scale=scale, per_channel=per_channel)
    assert_same(ours(model, penalty), expected)


@pytest.mark.parametrize("case", COMPUTED)
def test_a_weight_that_becomes_computed_after_conversion(case: str) -> None:
    model = gl.convert(linears())
    penalty = gl.GradL1(model, 0.3, 0.2)
    torch.manual_seed(5)
    COMPUTED[case](model.get_submodule("2"))
    model.eval()
    expected = truth(changed(COMPUTED[case]), LAMBDAS["both"], scale="step")
    assert_same(ours(model, penalty), expected)


class Standardised(nn.Conv2d):
    """Weight standardisation: the layer computes its weight in its own forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        self.used = w
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardised() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(Standardised(2, 3, 3), nn.Softplus(), Standardised(3, 2, 3)).double()


def loss_of_images(model: nn.Module) -> Tensor:
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(6)).double()
    return model(x).square().mean()


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("scale", ["none", "step"])
def test_standardised_weights(scale: str, per_channel: bool) -> None:
    plain = standardised()
    model = gl.convert(standardised(), per_channel=per_channel)
    expected = oracle.penalised_gradients(
        lambda: oracle.measure(plain, loss_of_images, weights=["0.used", "2.used"], inputs_of=["2"]),
        dict(plain.named_parameters()),
        **{"lambda_w": 0.3, "lambda_a": 0.2, "scale": scale, "per_channel": per_channel},
    )
    found = ours(model, gl.GradL1(model, 0.3, 0.2, scale), loss_of_images)
    assert_same(found, expected)
    assert set(found.terms) == {"0.weight", "2.weight", "2.input"}


@pytest.mark.parametrize("case", COMPUTED)
def test_a_pass_before_the_penalty_is_refused_by_name(case: str) -> None:
    model = gl.convert(changed(COMPUTED[case]))
    loss = curved(model)
    penalty = gl.GradL1(model, 1.0, 0.0)
    with pytest.raises(
        RuntimeError, match=r"2\.weight is a computed weight, and the tensor that the forward pass used"
    ):
        penalty(loss)


def checkpointed(model: nn.Module) -> Tensor:
    return checkpoint(model, data(), use_reentrant=False).square().mean()


# Hooks and pruning keep the weight alive in an attribute of the layer.
KEPT = ["weight_norm", "spectral_norm", "pruned"]


@pytest.mark.parametrize("case", [name for name in COMPUTED if name not in KEPT])
def test_a_weight_computed_in_a_checkpointed_region_is_refused_by_name(case: str) -> None:
    model = gl.convert(changed(COMPUTED[case]))
    penalty = gl.GradL1(model, 0.3, 0.0)
    with pytest.raises(
        RuntimeError, match=r"2\.weight is a computed weight, .*, or in a checkpointed region"
    ):
        penalty(checkpointed(model))


def test_activations_alone_need_no_weight() -> None:
    model = gl.convert(changed(nn.utils.spectral_norm))
    penalty = gl.GradL1(model, 0.0, 0.2)

    assert_same(
        ours(model, penalty, checkpointed), truth(changed(nn.utils.spectral_norm), (0.0, 0.2), scale="step")
    )


def test_one_bit_is_refused_by_name() -> None:
    model = gl.convert(changed(tripled))
    penalty = gl.GradL1(model, 1.0, 0.0)
    with (
        gl.bits(model, w=1, a=None),
        pytest.raises(RuntimeError, match=r"cannot penalise [02]\.weight at 1 bit"),
    ):
        penalty(curved(model))


def test_no_used_weight_outlives_its_graph() -> None:
    model = gl.convert(changed(tripled))
    penalty = gl.GradL1(model, 1.0, 0.0)
    for _ in range(3):
        loss = curved(model)
        (loss + penalty(loss)).backward()
    del loss
    assert model.get_submodule("2").weights_in_use() == []


def test_the_finite_difference_refuses_to_move_it() -> None:
    model = gl.convert(changed(tripled))
    penalty = gl.GradL1(model, 1.0, 0.0, method="finite_difference")
    with pytest.raises(RuntimeError, match="moves parameters, and the weight of 2 is computed"):
        penalty.backward(lambda: curved(model))
