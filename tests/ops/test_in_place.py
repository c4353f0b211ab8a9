"""Results of operations may be changed in place with correct gradients; saved tensors may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradl1_fast import functional as ours
from gradl1_fast.ops.tap import alias
from tests import oracle
from tests.gradients import assert_gradients
from tests.ops.cases import CASES, Case, random
from tests.ops.sweeps import leaf, random_like, scalar_probe
from tests.ops.test_against_oracle import Watching

# A batch norm may have saved its result, and a tap returns a view of its input.
OWN_RESULT = [c for c in CASES if c.op not in ("tap", "batch_norm_act")]
each_own_result = pytest.mark.parametrize("case", OWN_RESULT, ids=lambda c: c.id)
changed = pytest.raises(RuntimeError, match="modified by an inplace")


def change(y: Tensor) -> Tensor:
    y *= 2
    y += 0.5
    return nn.functional.leaky_relu(y, 0.5, inplace=True)


def unchanged(y: Tensor) -> Tensor:
    return nn.functional.leaky_relu(2 * y + 0.5, 0.5)


def penalised(function: Callable[..., Tensor], case: Case, then: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return values and gradients of a curved loss and a penalty on its gradients."""
    leaves = [leaf(t) for t in case.inputs()]
    y = then(function(*leaves))
    loss = y.sin().sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = sum(g.cos().sum() for g in gradients)
    return [y, *gradients, *torch.autograd.grad(loss + penalty, leaves)]


@each_own_result
def test_a_result_changed_in_place_has_the_gradients_of_one_that_was_not(case: Case) -> None:
    expected = penalised(case.truth, case, unchanged)
    assert_gradients(penalised(case.function, case, change), expected)
    with Watching():
        through_the_dispatcher = penalised(case.function, case, change)
    assert_gradients(through_the_dispatcher, expected)


@pytest.mark.parametrize("case", [c for c in OWN_RESULT if "one row" not in c.id], ids=lambda c: c.id)
def test_gradients_changed_in_place_have_the_derivative_of_those_that_were_not(case: Case) -> None:
    # Of one row, the gradient of the bias is the incoming gradient itself, which was saved.
    def second(function: Callable[..., Tensor], in_place: bool) -> list[Tensor | None]:
        leaves = [leaf(t) for t in case.inputs()]
        y = function(*leaves)
        dy = leaf(random_like(y, 11)) * 1
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        first = [g.mul_(2) if in_place else 2 * g for g in first]
        total = sum((g.sin() + g**2).sum() for g in first)
        return [*first, *torch.autograd.grad(total, [dy, *leaves], allow_unused=True)]

    assert_gradients(second(case.function, True), second(case.truth, False))


@pytest.mark.parametrize("case", [c for c in OWN_RESULT if "unbatched" not in c.id], ids=lambda c: c.id)
def test_a_result_computed_without_gradients_may_be_multiplied_by_a_parameter(case: Case) -> None:
    # Without a batch, PyTorch's own convolution returns a view too.
    factor = leaf(torch.tensor(3.0).double())
    with torch.no_grad():
        y = case.function(*case.inputs())
    expected = y.sum()
    y *= factor
    assert_gradients(torch.autograd.grad(y.sum(), factor), [expected])
    with torch.no_grad():
        y += 1


@pytest.mark.parametrize("name", ["linear sequence", "conv 1d", "conv_transpose 1d"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast(name: str, dtype: torch.dtype) -> None:
    case = next(c for c in CASES if c.id == name)

    def step(function: Callable[..., Tensor], then: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [leaf(t) for t in case.inputs(torch.float32)]
        with torch.autocast("cpu", dtype):
            y = then(function(*leaves))
        assert y.dtype == dtype
        return list(torch.autograd.grad(y.float().sin().sum(), leaves))

    assert_gradients(step(case.function, change), step(case.truth, unchanged), 0.02)


def test_relu_in_place_after_a_linear_layer_of_a_sequence() -> None:
    def step(linear: Callable[..., Tensor], in_place: bool) -> list[Tensor]:
        x, w, b = (leaf(random(shape, i)) for i, shape in enumerate([(2, 4, 5), (3, 5), (3,)]))
        y = nn.ReLU(inplace=in_place)(linear(x, w, b))
        gradients = torch.autograd.grad(y.exp().sum(), (x, w), create_graph=True)
        return [y, *torch.autograd.grad(sum(g.abs().sum() for g in gradients), (x, w))]

    assert_gradients(step(ours.linear, True), step(oracle.linear, False))


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), (5,)], ids=str)
def test_a_result_that_the_next_layer_saved_is_not_changed_unnoticed(shape: tuple[int, ...]) -> None:
    w = leaf(random((5, 5), 2))
    y = ours.linear(leaf(random(shape, 1)), w)
    z = ours.linear(y, w)
    y += 1
    with changed:
        torch.autograd.grad(z.sum(), w)


def test_an_input_of_fake_quantize_changed_afterwards_is_an_error() -> None:
    x = leaf(random((3, 4), 1)) * 1
    y = ours.fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -3, 3)
    x += 1
    with changed:
        y.sum().backward()


def test_fake_quantize_does_not_keep_the_tensor_itself() -> None:
    x = leaf(random((3, 4), 1)) * 1
    y = ours.fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), -3, 3)
    (kept, *_) = y.grad_fn.saved_tensors
    assert kept is not x
    assert kept.data_ptr() == x.data_ptr()
    x.result = y  # no cycle
    assert not hasattr(y.grad_fn.saved_tensors[0], "result")


def test_a_tapped_tensor_is_not_changed_in_place_unnoticed() -> None:
    x, probe = leaf(random((3, 4), 1)) * 1, scalar_probe(torch.ones(()))
    y = ours.tap(x, probe)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        y += 1


def test_an_alias_is_a_tap_but_not_a_view() -> None:
    def step(site: Callable[[Tensor, Tensor], Tensor], last: str) -> list[Tensor]:
        x, w, probe = leaf(random((2, 5), 1)), leaf(random((3, 5), 2)), leaf(torch.zeros(()).double())
        y = site(x, probe)
        loss = ours.linear(y, w).sin().sum()
        l1 = torch.autograd.grad(loss, y if last else probe, create_graph=True)[0].abs().sum()
        return [l1, *torch.autograd.grad(loss + l1, (x, w))]

    assert_gradients(step(alias, ""), step(lambda x, _: oracle.tap(x), "y"))
    x, probe = leaf(random((2, 5), 1)) * 1, leaf(torch.zeros(()))
    y = alias(x, probe)
    assert y._base is None
    assert y.data_ptr() == x.data_ptr()
    z = y.square()  # saves y
    x += 1
    with changed:
        z.sum().backward()


def test_an_alias_without_a_probe_to_measure_is_the_tensor() -> None:
    x, probe = leaf(random((2, 5), 1)), leaf(torch.zeros(()))
    assert alias(x, probe.detach()) is x
    with torch.no_grad():
        assert alias(x, probe) is x
