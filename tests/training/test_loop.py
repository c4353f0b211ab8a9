"""Training: repeatable, and twins differ in the penalty alone."""

import pytest
import torch

from gradl1_fast.training.data import digits
from gradl1_fast.training.loop.simple import Recipe, accuracy, train
from gradl1_fast.training.models import digits_net

DATA = tuple(part[:100] for part in digits(0).train)
RECIPE = Recipe(epochs=2, penalty_epochs=1, batch_size=50)


def trained(recipe, seed=0, **kwargs):
    torch.manual_seed(seed)
    return train(digits_net(4), DATA, recipe, seed, **kwargs)


def states_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def test_two_runs_from_one_seed_are_bitwise_equal():
    assert states_equal(trained(RECIPE), trained(RECIPE))


def test_another_seed_is_another_network():
    assert not states_equal(trained(RECIPE), trained(RECIPE, seed=1))


def test_twins_part_where_the_penalty_begins():
    losses = {"plain": [], "penalised": []}
    twins = [
        trained(recipe, on_epoch=lambda epoch, loss, kind=kind: losses[kind].append((epoch, loss)))
        for kind, recipe in (("plain", RECIPE.without_penalty()), ("penalised", RECIPE))
    ]
    assert [epoch for epoch, _ in losses["plain"]] == [1, 2]
    assert losses["plain"][0] == losses["penalised"][0]
    assert losses["plain"][1] != losses["penalised"][1]
    assert not states_equal(*twins)


def test_the_result_is_in_evaluation_mode():
    assert not trained(RECIPE).training


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracy_counts_every_image(batch_size):
    labels = torch.tensor([0, 1, 2, 0])
    logits = torch.eye(3)[[0, 1, 2, 2]]
    assert accuracy(torch.nn.Identity(), (logits, labels), batch_size) == 75.0
