"""Conversion, widths and state dicts of random networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization.bits import widths_of
from tests.gradients import relative_error
from tests.properties.build import LAYOUTS, batch, loss, make
from tests.properties.examples import examples
from tests.properties.grammar import Choice, Network, networks

LAYOUT, TRAINING = st.sampled_from(list(LAYOUTS)), st.booleans()
HALVES = Choice(dims=(2, 1))  # PyTorch has no mean over three-dimensional windows in half precision
WIDTHS = st.one_of(st.none(), st.integers(1, 16))


def states(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@examples(60)
@given(networks(), TRAINING, LAYOUT, st.booleans())
def test_converted_equals_original(network: Network, training: bool, layout: str, per_channel: bool) -> None:
    plain = make(network).train(training)
    original, before = copy.deepcopy(plain), states(plain)
    model, data = gl.convert(plain, per_channel=per_channel), batch(network, layout=layout)
    assert_same_state(states(plain), before)
    values = []
    for one in (model, original):
        value = loss(one, data)
        values.append([value, *torch.autograd.grad(value, list(one.parameters()))])
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for (name, ours), theirs in zip(model.state_dict().items(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15, msg=name)
    torch.testing.assert_close(model(data[0]), original(data[0]), rtol=1e-9, atol=1e-12)


@examples(40)
@given(networks(HALVES), TRAINING, LAYOUT, st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_low_precision_errs_no_more_than_the_original(
    network: Network, training: bool, layout: str, dtype: torch.dtype
) -> None:
    exact, (inputs, *_) = make(network).train(training), batch(network)
    truth, multiplied = exact(inputs), leverage(exact, inputs) if training else 1.0
    x, eps = batch(network, dtype, layout)[0], torch.finfo(dtype).eps
    plain = make(network, dtype).train(training)
    model = gl.convert(copy.deepcopy(plain))
    ours, theirs = model(x), plain(x)
    assert ours.dtype == theirs.dtype == dtype
    assert ours.isfinite().all()
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + 8 * eps * multiplied


def leverage(model: nn.Module, x: Tensor) -> float:
    """Return by how much batch norms multiply what was rounded: 1, or the largest |mean| / std of a channel.

    In a channel of almost one value, as behind a convolution that meets padding alone, that is up to 300.
    """
    found = [1.0]

    def look(norm: Any, inputs: tuple[Tensor]) -> None:
        values, dims = inputs[0].detach(), [0, *range(2, inputs[0].dim())]
        mean, variance = values.mean(dims), values.var(dims, correction=0)
        found.append(float((mean.abs() * (variance + norm.eps).rsqrt()).max()))

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(look)
    model(x)
    return max(found)


def structure(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(module).__name__) for name, module in model.named_modules()]


@examples(30)
@given(networks(), TRAINING, st.booleans())
def test_convert_is_idempotent(network: Network, training: bool, per_channel: bool) -> None:
    model = gl.convert(make(network).train(training), per_channel=per_channel)
    before = structure(model)
    assert gl.convert(model) is model
    assert gl.convert(model, per_channel=not per_channel) is model
    assert structure(model) == before
    again = gl.convert(make(network).train(training), per_channel=per_channel)
    assert structure(again) == before


@examples(30)
@given(networks())
def test_state_dicts_go_strictly_both_ways(network: Network) -> None:
    plain, x = make(network).eval(), batch(network)[0]
    other = gl.convert(make(network, seed=network.seed + 1).eval())
    other.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(other(x), plain(x), rtol=1e-9, atol=1e-12)
    back = make(network, seed=network.seed + 2).eval()
    back.load_state_dict(other.state_dict(), strict=True)
    assert_same_state(states(back), states(plain))
    assert torch.equal(back(x), plain(x))


class BoomError(Exception):
    pass


@examples(40)
@given(networks(), WIDTHS, WIDTHS, WIDTHS, WIDTHS, TRAINING, st.booleans())
def test_bits_leaves_no_trace(
    network: Network,
    w: int | None,
    a: int | None,
    inner_w: int | None,
    inner_a: int | None,
    training: bool,
    raises: bool,
) -> None:
    model, x = gl.convert(make(network).train(training)), batch(network)[0]
    gl.calibrate(model, [x])
    gl.set_bits(model, w=w, a=a)
    probes = {name: q.probe for name, q in model.named_modules() if isinstance(q, gl.nn.ActivationQuantizer)}
    trace = _trace(model)
    modes = [module.training for module in model.modules()]

    def use() -> None:
        with gl.bits(model, w=inner_w, a=inner_a) as same:
            assert same is model
            assert set(widths_of(model)[0].values()) == {inner_w}
            inner = {name for name, q in named_quantizers(model).items() if not q.is_input}
            assert {bits for name, bits in widths_of(model)[1].items() if name in inner} <= {inner_a}
            model.eval()(x)
            if raises:
                raise BoomError

    for block in (use, lambda: _nested(model, use)):
        with pytest.raises(BoomError) if raises else torch.enable_grad():
            block()
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        assert _equal(_trace(model), trace)
    assert all(model.get_submodule(name).probe is probe for name, probe in probes.items())


def _nested(model: nn.Module, use: Callable[[], None]) -> None:
    with gl.bits(model, w=3, a=None):
        use()


def _trace(model: nn.Module) -> list[object]:
    """Return all that a quantizer could leave behind: widths, ranges, buffers, gradients."""
    return [
        *widths_of(model),
        {name: t.clone() for name, t in model.named_buffers()},
        {name: t.detach().clone() for name, t in model.named_parameters()},
        [name for name, p in model.named_parameters() if p.grad is not None],
    ]


def _equal(one: list[object], two: list[object]) -> bool:
    for a, b in zip(one, two, strict=True):
        if isinstance(a, dict) and any(isinstance(v, Tensor) for v in a.values()):
            if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
                return False
        elif a != b:
            return False
    return True
