"""Every operation compared with automatic differentiation and finite differences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gradients import assert_gradients
from tests.ops.cases import CASES, Case
from tests.ops.sweeps import leaf, scalar_probe, sweep

each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
PROBE_FACTOR = 0.3


@each_case
def test_three_passes(case: Case) -> None:
    actual, expected = sweep(case), sweep(case, truth=True)
    assert_gradients(actual.flat(), expected.flat())


@each_case
def test_three_passes_through_the_dispatcher(case: Case) -> None:
    # An operator may take a shorter way where nothing watches; here something does.
    with Watching() as mode:
        actual = sweep(case)
    assert f"{case.op}_double_backward" in mode.seen
    assert_gradients(actual.flat(), sweep(case, truth=True).flat())


@each_case
@pytest.mark.parametrize("last", ["grad", "backward"])
def test_penalised_loss(case: Case, last: str) -> None:
    assert_gradients(_penalised(case, last, False), _penalised(case, last, True))


@pytest.mark.parametrize("case", [c for c in CASES if not c.straight_through], ids=lambda c: c.id)
def test_first_order_by_finite_differences(case: Case) -> None:
    leaves = [leaf(t) for t in case.inputs()]
    probe = scalar_probe(leaves[0]) if case.probe else None
    assert torch.autograd.gradcheck(lambda *t: case.call(t, probe), leaves)


@each_case
def test_second_order_by_finite_differences(case: Case) -> None:
    leaves = [leaf(t) for t in case.inputs()]
    if case.probe:
        assert torch.autograd.gradgradcheck(
            lambda *t: case.call(t[:-1], t[-1]), [*leaves, scalar_probe(leaves[0])]
        )
    else:
        assert torch.autograd.gradgradcheck(case.function, leaves)


class Watching(TorchDispatchMode):
    """Notes the operators of the package that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gradl1_fast":
            self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _penalised(case: Case, last: str, truth: bool) -> list[Tensor | None]:
    """Return the gradients of a curved loss plus penalties on its gradients and on its l1 term."""
    leaves = [leaf(t) for t in case.inputs()]
    probe = scalar_probe(leaves[0]) if case.probe else None
    y = case.truth(*leaves) if truth else case.call(leaves, probe)
    loss = (y.sin() + 0.1 * y**3).sum()
    sites = [] if probe is None else [y if truth else probe]
    gradients = torch.autograd.grad(loss, leaves + sites, create_graph=True)
    penalty = sum(g.cos().sum() for g in gradients[: len(leaves)])
    if sites:
        penalty = penalty + PROBE_FACTOR * gradients[-1].abs().sum()
    if last == "grad":
        return list(torch.autograd.grad(loss + penalty, leaves, allow_unused=True))
    (loss + penalty).backward()
    return [t.grad for t in leaves]
