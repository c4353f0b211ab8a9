"""Penalty and gradient of random networks compared with float64 double backprop."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradl1_fast as gl
from tests import oracle
from tests.penalty.test_against_oracle import assert_same
from tests.properties import walk
from tests.properties.build import LAYOUTS, batch, channels_last, loss, make
from tests.properties.examples import examples
from tests.properties.grammar import Network, networks

SMALLEST = 1e-4  # a range below is that of a tensor that is zero but for rounding
BACKENDS = (None, "reference")
DEAD = 1e-9  # a penalty below is that of a network whose gradients are zero but for rounding


@dataclass(frozen=True)
class Setting:
    """How a network is penalised."""

    lambda_w: float = 1.0
    lambda_a: float = 1.0
    scale: str = "none"
    training: bool = True
    w: int | None = None
    a: int | None = None
    per_channel: bool = False
    layout: str = "contiguous"


SETTINGS = st.builds(
    Setting,
    lambda_w=st.sampled_from((1.0, 0.03, 0.0)),
    lambda_a=st.sampled_from((1.0, 0.2, 0.0)),
    scale=st.sampled_from(("none", "step")),
    training=st.sampled_from((True, True, False)),
    w=st.sampled_from((None, 2, 3, 4, 8)),
    a=st.sampled_from((None, 1, 2, 4, 8)),
    per_channel=st.booleans(),
    layout=st.sampled_from(list(LAYOUTS)),
)
FLOATS = SETTINGS.map(lambda setting: replace(setting, w=None, a=None))


def found_in(network: Network) -> walk.Layout:
    return walk.layout(network, make(network), batch(network)[0])


def plain(
    network: Network, setting: Setting, found: walk.Layout, dtype: torch.dtype = torch.float64
) -> nn.Module:
    model = make(network, dtype).train(setting.training)
    if setting.w is not None:
        walk.quantize_weights(model, found.weights, setting.w, per_channel=setting.per_channel)
    return model


def truth(
    network: Network, setting: Setting, found: walk.Layout, noise: float = walk.NOISE
) -> oracle.Penalised:
    """Return what the oracle computes; reject a network in which rounding decides a sign or an extreme."""
    data = batch(network)
    for reverse in (False, True):
        inputs = tuple(t.flip(0) if reverse else t for t in data)
        measured, passed = walk.measure(network, plain(network, setting, found), inputs, found, setting.a)
        assume(walk.decided(passed, measured, extremes=setting.scale == "step", noise=noise))
    result = double_backprop(network, setting, found)
    assume(float(result.penalty) > DEAD or not (setting.lambda_w or setting.lambda_a))
    return result


def double_backprop(
    network: Network, setting: Setting, found: walk.Layout, dtype: torch.dtype = torch.float64
) -> oracle.Penalised:
    """Return what ordinary autograd computes."""
    model, data = plain(network, setting, found, dtype), batch(network, dtype)
    result = oracle.penalised_gradients(
        lambda: walk.measure(network, model, data, found, setting.a)[0],
        dict(model.named_parameters()),
        lambda_w=setting.lambda_w,
        lambda_a=setting.lambda_a,
        scale=setting.scale,
        per_channel=setting.per_channel,
    )
    original = ".parametrizations.weight.original"
    gradients = {name.replace(original, ".weight"): g for name, g in result.gradients.items()}
    return oracle.Penalised(result.loss, result.penalty, result.terms, gradients)


def ours(
    network: Network, setting: Setting, backend: str | None, dtype: torch.dtype = torch.float64
) -> oracle.Penalised:
    """Return what we compute; without a backend, by the one that is chosen for the CPU."""
    model = gl.convert(make(network, dtype).train(setting.training), per_channel=setting.per_channel)
    data = batch(network, dtype, setting.layout)
    if setting.layout == "channels last":
        for p in model.parameters():
            p.data = channels_last(p.data)
    if setting.a is not None:
        gl.calibrate(model, [data])
    gl.set_bits(model, w=setting.w, a=setting.a)
    with gl.backend(backend) if backend else nullcontext():
        penalty = gl.GradL1(model, setting.lambda_w, setting.lambda_a, setting.scale)
        value = loss(model, data)
        extra = penalty(value)
        (value + extra).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return oracle.Penalised(value.detach(), extra.detach(), dict(penalty.terms), gradients)


def usable(setting: Setting, found: walk.Layout) -> bool:
    """Say whether there is something to penalise, and no range that is zero but for rounding."""
    if setting.lambda_a and not found.penalised:
        return False
    quantized = setting.a is not None or setting.scale == "step"
    ends = [site.ends for site in found.sites.values()]
    return not quantized or all(float(torch.maximum(-low, high)) > SMALLEST for low, high in ends)


def has_no_ties(network: Network, setting: Setting) -> bool:
    """Say whether no maximum is taken where values are on coarse grids, of which several may be largest."""
    return (setting.w is None and setting.a is None) or "kind='max'" not in repr(network)


@examples(60)
@given(networks(), SETTINGS)
def test_penalty_and_gradient_equal_the_oracle(network: Network, setting: Setting) -> None:
    found = found_in(network)
    assume(usable(setting, found) and has_no_ties(network, setting))
    expected = truth(network, setting, found)
    for backend in BACKENDS:
        actual = ours(network, setting, backend)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-12, atol=0)
        assert_same(actual, expected, 1e-10)
        if setting.lambda_w and setting.lambda_a:
            assert_same_terms(actual, expected, setting)


def assert_same_terms(actual: oracle.Penalised, expected: oracle.Penalised, setting: Setting) -> None:
    sites: dict[str, Tensor] = {}
    for name, term in expected.terms.items():  # a site has one term for all of its tensors
        site = name.split(", tensor")[0]
        sites[site] = sites.get(site, torch.zeros_like(term)) + term
    assert len(actual.terms) == len(sites)
    if setting.scale == "none":  # the oracle's are without the step
        found, wanted = (torch.stack([*terms.values()]).sort().values for terms in (actual.terms, sites))
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-15)


@examples(40)
@given(networks(), FLOATS)
def test_float32_is_close_to_the_oracle(network: Network, setting: Setting) -> None:
    found = found_in(network)
    assume(usable(setting, found))
    expected = truth(network, setting, found, noise=1e-4)
    eager = double_backprop(network, setting, found, torch.float32)
    for backend in BACKENDS:
        actual = ours(network, setting, backend, torch.float32)
        assert {g.dtype for g in actual.gradients.values()} == {torch.float32}
        assert_near(actual, expected, eager)


def assert_near(actual: oracle.Penalised, expected: oracle.Penalised, eager: oracle.Penalised) -> None:
    """Allow an error of 1e-4, or twice that of ordinary autograd in the same type.

    A batch norm multiplies by 300 where a channel has one value, as behind a convolution that meets padding
    alone, which leaves few digits of float32, whoever computes it.
    """

    def check(what: str, a: Tensor, e: Tensor, other: Tensor, size: Tensor) -> None:
        error, of_eager = ((t.double() - e).norm() for t in (a, other))
        assert error <= max(1e-4 * size, 2 * of_eager), f"{what}: {error:.3g}, eager {of_eager:.3g}"

    check("penalty", actual.penalty, expected.penalty, eager.penalty, expected.penalty)
    assert actual.gradients.keys() == expected.gradients.keys()
    whole = torch.cat([g.flatten() for g in expected.gradients.values()]).norm()
    for name, e in expected.gradients.items():
        check(name, actual.gradients[name], e, eager.gradients[name], torch.maximum(e.norm(), whole / 10))
