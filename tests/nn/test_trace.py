"""What an attempt to record a forward pass leaves alone, and what is no obstacle to it."""

from __future__ import annotations

import warnings

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.nn.converted import ConvertedModel
from tests.nn import models
from tests.nn.changing import CHANGING, OutputsListed, ScaleOptional, own_forward
from tests.nn.runs import built, images

pytestmark = pytest.mark.filterwarnings("ignore:gradl1_fast.convert")


def test_nothing_is_left_of_an_attempt_to_trace() -> None:
    model = built(OutputsListed)
    converted = gl.convert(model)
    assert model.seen == converted.seen == []
    assert not [name for name in vars(converted) if name.startswith("_tensor_constant")]


@pytest.mark.parametrize("name", CHANGING)
def test_an_attempt_to_trace_changes_nothing(name: str) -> None:
    model = built(CHANGING[name][0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes, shown = list(vars(model)), str(vars(model))
    gl.convert(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(vars(model)) == attributes
    assert str(vars(model)) == shown


def test_a_layer_with_a_forward_of_its_own_is_left_and_named() -> None:
    model = built(own_forward)
    with pytest.warns(UserWarning, match=r"left in float.* conv1 \(Conv2d\)") as caught:
        converted = gl.convert(model)
    assert "the forward() of conv1 was replaced" in str(caught[0].message)
    assert torch.equal(converted(images()), model(images()))


def test_the_order_of_a_set_is_no_obstacle() -> None:
    model = built(lambda: models.model(models.batch_norm_alone))
    model.numbers = set(range(1000))
    for number in {*range(1000)} - {9, 16}:
        model.numbers.discard(number)
    assert list(model.numbers) != list(model.numbers.copy()), "another set is needed to show it"
    assert isinstance(gl.convert(model), ConvertedModel)


def test_a_sparse_buffer_is_no_obstacle() -> None:
    model = built(lambda: models.model(models.batch_norm_alone))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(gl.convert(model), ConvertedModel)


def test_an_optional_argument_without_a_branch_is_traced() -> None:
    model = built(ScaleOptional)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = gl.convert(model)
    assert isinstance(converted, ConvertedModel)
    for arguments in ((), (3.0,)):
        torch.testing.assert_close(converted(images(), *arguments), model(images(), *arguments))
