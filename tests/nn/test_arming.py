"""The arming state of a model: armed while a penalty will differentiate the next forward pass."""

from __future__ import annotations

import copy
import gc
import pickle

import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.nn.arming import Arming, armings_of, is_armed


def make() -> nn.Module:
    return gl.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)))


def arming(model: nn.Module) -> Arming:
    (found,) = armings_of(model.modules())
    return found


def test_a_penalty_arms_and_its_deletion_disarms() -> None:
    model = make()
    assert not is_armed(arming(model))
    penalty = gl.GradL1(model, 0.1, 0.1)
    assert is_armed(arming(model))
    with torch.no_grad():
        assert not is_armed(arming(model))
    other = gl.GradL1(model, 0.1, 0.1)
    del penalty
    gc.collect()
    assert is_armed(arming(model))
    del other
    gc.collect()
    assert not is_armed(arming(model))


def test_a_penalty_on_every_other_step_arms_only_these_steps() -> None:
    model = make()
    penalty = gl.GradL1(model, 0.1, 0.1, every=2)
    states = []
    for _ in range(4):
        states.append(is_armed(arming(model)))
        penalty(model(torch.randn(2, 3)).sum().square())
    assert states == [False, True, False, True]


def test_copies_are_not_armed() -> None:
    model = make()
    penalty = gl.GradL1(model, 0.1, 0.1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_armed(arming(twin))
        assert arming(twin).planner is arming(model).planner
    assert is_armed(arming(model))
    del penalty


def test_separately_created_layers_have_their_own_arming_state() -> None:
    model = nn.Sequential(gl.QLinear(3, 3), gl.QLinear(3, 2))
    assert len(list(armings_of(model.modules()))) == 2
    penalty = gl.GradL1(model, 0.1, 0.1)
    assert all(map(is_armed, armings_of(model.modules())))
    penalty(model(torch.randn(2, 3)).sum().square())
    assert {"0.weight", "1.weight"} <= set(penalty.terms)
