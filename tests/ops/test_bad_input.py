"""NaN, infinities, overflow, odd sizes, changed tensors, mixed devices: correct, or a clear error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradl1_fast import functional as ours
from tests import oracle
from tests.gradients import assert_gradients
from tests.ops.cases import CASES, Case, _batch_norm, _conv, _fake_quantize
from tests.ops.sweeps import leaf, random_like, scalar_probe, sweep

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
on_each_backend = pytest.mark.usefixtures("each_cpu_backend")
L1 = {"function": lambda *t: ours.l1_norm(t), "truth": lambda *t: oracle.l1_norm(t)}
LINEAR = {"function": ours.linear, "truth": oracle.linear}
TAP = {"function": ours.tap, "truth": oracle.tap, "probe": True}

ODD_SIZES = [
    Case("tap of nothing", shapes=((0, 3),), **TAP),
    _fake_quantize("of nothing", (0, 3), (0, 7), axis=1),
    _fake_quantize("no channels", (3, 0), (0, 7), axis=1),
    _fake_quantize("70,000 channels", (2, 70_000), (0, 7), axis=1, zero=3),
    Case("l1_norm of nothing", shapes=((0,), (2, 0)), **L1),
    Case("l1_norm of 3,000 tensors", shapes=((1,),) * 3000, **L1),
    _batch_norm("empty batch, quantized", (0, 4, 3, 2), grid=(0.5, 3.0, 0, 7)),
    _batch_norm("empty batch, residual, quantized", (0, 4, 3, 2), (0, 4, 3, 2), grid=(0.5, 3.0, 0, 7)),
    _conv("empty batch", (0, 3, 6, 5), (4, 3, 3, 3), padding="same"),
    _conv("empty batch, depthwise", (0, 4, 6, 5), (4, 1, 3, 3), groups=4),
    _conv("70,000 input channels", (1, 70_000, 2), (2, 70_000, 1)),
    _conv("70,000 output channels", (1, 2, 2), (70_000, 2, 1)),
    Case("linear empty batch", shapes=((2, 0, 5), (3, 5), (3,)), **LINEAR),
    Case("linear no features", shapes=((4, 0), (3, 0), (3,)), **LINEAR),
    Case("linear no outputs", shapes=((4, 5), (0, 5), (0,)), **LINEAR),
    _batch_norm("empty batch", (0, 3, 2, 2), training=True),
    _batch_norm("empty batch, residual", (0, 3, 2), (0, 3, 2), training=True, activation="relu"),
    _batch_norm("empty batch, evaluation", (0, 3, 2, 2), activation="relu6"),
    _batch_norm("70,000 channels", (2, 70_000, 3), training=True, activation="relu"),
    _batch_norm("one pixel", (2, 3, 1, 1), training=True),
    _batch_norm("one image", (1, 3, 1, 2), training=True, activation="relu"),
]


@on_each_backend
@pytest.mark.parametrize("case", ODD_SIZES, ids=lambda c: c.id)
def test_odd_sizes(case: Case) -> None:
    assert_gradients(sweep(case).flat(), sweep(case, truth=True).flat())


@on_each_backend
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_channels(training: bool) -> None:
    # PyTorch's own raises an IndexError here.
    result = sweep(_batch_norm("no channels", (2, 0, 3), training=training, activation="relu"))
    assert result.y.shape == result.first[0].shape == (2, 0, 3)


@on_each_backend
@each_case
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input_gives_the_same_result_as_in_pytorch(case: Case, value: float) -> None:
    inputs = case.inputs(torch.float32)
    inputs[0].view(-1)[0] = value
    torch.testing.assert_close(
        _first_order(case, inputs, False), _first_order(case, inputs, True), equal_nan=True
    )


def _first_order(case: Case, inputs: list[Tensor], truth: bool) -> list[Tensor]:
    leaves = [leaf(t) for t in inputs]
    y = case.truth(*leaves) if truth else case.call(leaves, scalar_probe(leaves[0]) if case.probe else None)
    return [y, *torch.autograd.grad(y, leaves, random_like(y, 11))]


@on_each_backend
@each_case
def test_non_finite_gradients_propagate(case: Case) -> None:
    leaves = [leaf(t) for t in case.inputs()]
    probe = scalar_probe(leaves[0]) if case.probe else None
    y = case.call(leaves, probe)
    asked = leaves if probe is None else [*leaves, probe]
    gradients = torch.autograd.grad(y, asked, torch.full_like(y, float("nan")), create_graph=True)
    assert all(g.isnan().any() for g in gradients)


@each_case
def test_two_backward_passes_over_one_graph(case: Case) -> None:
    leaves = [leaf(t) for t in case.inputs()]
    y = case.call(leaves, scalar_probe(leaves[0]) if case.probe else None)
    dy = leaf(random_like(y, 11))
    first, again = (torch.autograd.grad(y, leaves, dy, create_graph=True) for _ in range(2))
    second, repeated = (
        torch.autograd.grad(sum(g.cos().sum() for g in gs), dy, retain_graph=True) for gs in (first, first)
    )
    assert all(torch.equal(a, b) for a, b in zip((*first, *second), (*again, *repeated), strict=True))


@each_case
def test_two_runs_are_bitwise_equal(case: Case) -> None:
    one, two = (sweep(case, dtype=torch.float32).flat() for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, two, strict=True))


SAVED = {
    "tap": 0,
    "fake_quantize": 1,
    "l1_norm": 4,
    "conv": 2,
    "conv_transpose": 2,
    "linear": 2,
    "batch_norm_act": 2,
}


@each_case
def test_a_saved_input_changed_in_place_is_an_error(case: Case) -> None:
    padded = "odd total" in case.id  # then a padded copy of x is what was saved
    for index in range(1 if padded else 0, min(SAVED[case.op], len(case.shapes))):
        leaves = [leaf(t) for t in case.inputs()]
        y = case.call(leaves, scalar_probe(leaves[0]) if case.probe else None)
        with torch.no_grad():
            leaves[index].mul_(2)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            torch.autograd.grad(y.sum(), leaves)


@each_case
def test_a_saved_gradient_changed_in_place_is_an_error(case: Case) -> None:
    leaves = [leaf(t) for t in case.inputs()]
    probe = scalar_probe(leaves[0]) if case.probe else None
    y = case.call(leaves, probe)
    dy = leaf(random_like(y, 11))
    first = torch.autograd.grad(y, leaves if probe is None else [*leaves, probe], dy, create_graph=True)
    with torch.no_grad():
        (leaves[0] if case.op == "l1_norm" else dy).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        torch.autograd.grad(sum(g.sum() for g in first), dy)


@pytest.mark.parametrize("case", [c for c in CASES if c.probe or len(c.shapes) > 1], ids=lambda c: c.id)
def test_mixed_devices_are_an_error(case: Case) -> None:
    first, *rest = case.inputs()
    with pytest.raises(ValueError, match=f"^{case.op}: all tensors must be on one device, got cpu, meta$"):
        case.call([first.to("meta"), *rest], scalar_probe(first) if case.probe else None)


def test_one_value_per_channel_in_training_raises_pytorchs_error() -> None:
    x, statistics = torch.ones(1, 3, 1, 1), (torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="more than 1 value") as theirs:
        F.batch_norm(x, *statistics, training=True)
    with pytest.raises(ValueError, match="more than 1 value") as error:
        ours.batch_norm_act(x, *statistics, training=True)
    assert str(error.value) == str(theirs.value)
