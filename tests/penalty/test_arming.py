"""When a penalty arms a model; other passes run PyTorch's own operators and measure nothing."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradl1_fast as gl
from gradl1_fast.nn.arming import armings_of
from gradl1_fast.penalty.checks.graph import nodes_of
from tests.gradients import assert_gradients
from tests.networks import VGG
from tests.penalty.small import assert_same, curved, data, linears, ours, truth


def is_armed(model: nn.Module) -> bool:
    return any(arming.armed for arming in armings_of(model.modules()))


def measures(model: nn.Module) -> bool:
    return any(m.is_measured for m in model.modules() if isinstance(m, gl.nn.ActivationQuantizer))


def functions_of(loss: Tensor) -> set[str]:
    """Return the names of this library's functions in the graph of a loss."""
    kinds: Iterator[type | None] = (getattr(node, "_forward_cls", None) for node, _ in nodes_of([loss]))
    return {kind.__name__ for kind in kinds if kind is not None and kind.__module__.startswith("gradl1_fast")}


@pytest.fixture
def model() -> nn.Module:
    return gl.convert(linears())


def test_without_a_penalty_a_pass_runs_pytorchs_own_operators() -> None:
    plain = VGG.make()
    model, loss = gl.convert(plain), VGG.loss(plain)
    found = VGG.loss(model)
    assert not functions_of(found)
    assert [n.name() for n, _ in nodes_of([found])] == [n.name() for n, _ in nodes_of([loss])]
    penalty = gl.GradL1(model, 1.0, 1.0)
    assert functions_of(VGG.loss(model))
    assert penalty.sites


def test_skipped_passes_are_ordinary(model: nn.Module) -> None:
    penalty = gl.GradL1(model, 1.0, 1.0, every=3)
    graphs, values = [], []
    for _ in range(6):
        loss = curved(model)
        graphs.append(bool(functions_of(loss)))
        values.append(penalty(loss))
    assert graphs == [False, False, True] * 2
    assert [bool(v) for v in values] == graphs
    assert not values[0].requires_grad
    always = gl.GradL1(model, 1.0, 1.0)
    torch.testing.assert_close(values[2], 3 * always(curved(model)))


def test_a_skipped_call_does_not_change_the_terms(model: nn.Module) -> None:
    penalty = gl.GradL1(model, 1.0, 1.0, every=2)
    for _ in range(2):
        penalty(curved(model))
    before = dict(penalty.terms)
    assert before
    penalty(curved(model))
    assert penalty.terms == before


def test_with_every_each_call_counts_even_for_the_same_loss(model: nn.Module) -> None:
    penalty, loss = gl.GradL1(model, 1.0, 0.0, every=2), curved(model)
    assert [bool(penalty(loss)) for _ in range(4)] == [False, True, False, True]


def test_no_batch_is_measured_while_both_lambdas_are_zero(model: nn.Module) -> None:
    penalty = gl.GradL1(model, 1.0, 1.0)
    expected = penalty(curved(model))
    penalty.lambda_w = penalty.lambda_a = 0.0
    assert not is_armed(model)
    assert not measures(model)
    assert not functions_of(curved(model))
    assert penalty(curved(model)) == 0
    penalty.lambda_w, penalty.lambda_a = 1.0, 1.0
    assert torch.equal(penalty(curved(model)), expected)


def test_a_lambda_of_zero_arms_without_measuring(model: nn.Module) -> None:
    penalty = gl.GradL1(model, 1.0, 0.0)
    assert is_armed(model)
    assert not measures(model)
    penalty.lambda_a = 1.0
    assert measures(model)


def test_two_penalties_of_one_model_with_different_periods() -> None:
    model = gl.convert(linears())
    often, rarely = gl.GradL1(model, 1.0, 1.0, every=2), gl.GradL1(model, 1.0, 1.0, every=3)
    armed, values = [], []
    for _ in range(6):
        loss = curved(model)
        armed.append(bool(functions_of(loss)))
        values.append((bool(often(loss)), bool(rarely(loss))))
    assert armed == [False, True, True, True, False, True]
    assert values == [(i % 2 == 0, i % 3 == 0) for i in range(1, 7)]


def test_the_model_is_disarmed_when_the_penalty_is_deleted(model: nn.Module) -> None:
    first, second = gl.GradL1(model, 1.0, 1.0), gl.GradL1(model, 1.0, 0.0)
    del first
    gc.collect()
    assert is_armed(model)
    assert not measures(model)
    del second
    gc.collect()
    assert not is_armed(model)
    assert not functions_of(curved(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_an_armed_model_is_disarmed_and_can_be_armed(
    model: nn.Module, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    penalty = gl.GradL1(model, 1.0, 1.0)
    twin = duplicate(model)
    assert is_armed(model)
    assert not is_armed(twin)
    assert not measures(twin)
    assert not functions_of(curved(twin))
    of_twin = gl.GradL1(twin, 1.0, 1.0)
    assert torch.equal(of_twin(curved(twin)), penalty(curved(model)))


def test_evaluation_of_an_armed_model_is_that_of_the_plain_one() -> None:
    plain = VGG.make().eval()
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 1.0)
    x, _ = VGG.batch()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x), plain(x))
    assert is_armed(model)
    assert penalty(VGG.loss(model)).isfinite()


def test_a_pass_before_the_penalty_is_exact_for_weights() -> None:
    plain = linears()
    model = gl.convert(plain)
    loss = curved(model)
    assert not functions_of(loss)
    penalty = gl.GradL1(model, 1.0, 0.0)
    expected = truth(plain, ["0.weight", "2.weight"], lambda_a=0.0)
    assert_same(ours(model, penalty, lambda _: loss), expected)


def test_a_pass_before_the_penalty_is_an_error_for_activations(model: nn.Module) -> None:
    loss = curved(model)
    penalty = gl.GradL1(model, 1.0, 1.0)
    with pytest.raises(
        RuntimeError, match=r"no gradient reached any activation.*created after this forward pass"
    ):
        penalty(loss)


def test_a_pass_between_two_due_calls_is_exact_for_weights() -> None:
    plain = VGG.make()
    model = gl.convert(plain)
    penalty = gl.GradL1(model, 1.0, 0.0, every=2)
    loss = VGG.loss(model)
    assert not functions_of(loss)
    penalty(loss)
    weights = [f"{i}.weight" for i in (0, 3, 7, 12, 14) if hasattr(plain[i], "weight")]
    names = [name for name in weights if plain.get_parameter(name).dim() > 1]
    found = ours(model, penalty, lambda _: loss)
    expected = truth(VGG.make(), names, loss=VGG.loss, lambda_w=2.0, lambda_a=0.0)
    assert_same(found, expected)


def test_a_pass_without_gradients_between_forward_pass_and_penalty_changes_nothing(model: nn.Module) -> None:
    penalty = gl.GradL1(model, 1.0, 1.0)
    expected = penalty(curved(model))
    loss = curved(model)
    with torch.no_grad():
        model(2 * data())
    assert torch.equal(penalty(loss), expected)


class Checkpointed(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed, self.stem = checkpointed, nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return checkpoint(self.block, y, use_reentrant=False) if self.checkpointed else self.block(y)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_recomputation_uses_the_original_arming_state(every: int) -> None:
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model = gl.convert(Checkpointed(checkpointed).double())
        penalty = gl.GradL1(model, 0.3, 0.2, every=every)
        for x in torch.randn(5, 3, 4, dtype=torch.float64).unbind():
            loss = model(x).square().mean()
            (loss + penalty(loss)).backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert_gradients(*results, 1e-12)


def test_a_disabled_penalty_is_zero_and_its_steps_are_ordinary() -> None:
    model = gl.convert(Checkpointed(False))
    penalty = gl.GradL1(model, 0.3, 0.2)
    penalty.enabled = False
    loss = model(torch.randn(3, 4)).square().mean()
    assert penalty(loss) == 0
    assert not model.stem.arming.armed
    penalty.enabled = True
    loss = model(torch.randn(3, 4)).square().mean()
    assert penalty(loss) > 0
