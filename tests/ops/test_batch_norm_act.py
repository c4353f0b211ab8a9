from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradl1_fast import functional as ours
from tests import oracle
from tests.gradients import assert_gradients, relative_error
from tests.ops.cases import BATCH_NORM_ACT, Case, random
from tests.ops.sweeps import leaf, scalar_probe

SHAPES = [(4, 3), (4, 3, 5), (4, 3, 2, 5), (2, 3, 2, 1, 2)]


def statistics(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random((3,), 7).to(dtype), random((3,), 8).abs().add(0.5).to(dtype)


def second_order(operation: Callable[..., Tensor], x: Tensor, **options: object) -> None:
    x = leaf(x)
    first = torch.autograd.grad(operation(x, **options).sin().sum(), x, create_graph=True)[0]
    torch.autograd.grad(first.square().sum(), x)


QUANTIZED = [c for c in BATCH_NORM_ACT if "quantized" in c.id and "relu6" not in c.id]


@pytest.mark.parametrize("case", [c for c in BATCH_NORM_ACT if "relu" in c.id], ids=lambda c: c.id)
def test_the_cases_cover_the_ends_of_the_activation(case: Case) -> None:
    y = case.truth(*case.inputs())
    assert (y == 0).any()
    assert (y > 0).any()
    assert "relu6" not in case.id or (y == 6).any()


@pytest.mark.parametrize("case", QUANTIZED, ids=lambda c: c.id)
def test_the_quantized_cases_have_clamped_and_unclamped_values(case: Case) -> None:
    y = case.truth(*case.inputs())
    assert (y == y.max()).sum() > 1  # beyond the last code, all are one
    assert 2 < len(y.unique()) <= 8


def test_an_output_that_nothing_needs_may_be_changed_in_place() -> None:
    x = leaf(random((4, 3), 1))
    y = ours.batch_norm_act(x, None, None, training=True)
    y.mul_(2)
    (dx,) = torch.autograd.grad(y.sin().sum(), x)
    twin = leaf(x.detach())
    expected = torch.autograd.grad((2 * F.batch_norm(twin, None, None, training=True)).sin().sum(), twin)
    assert_gradients([dx], expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
def test_running_statistics_equal_those_of_pytorch_and_are_updated_once(
    shape: tuple[int, ...], momentum: float
) -> None:
    x, actual, expected = random(shape, 1), statistics(), statistics()
    F.batch_norm(x, *expected, training=True, momentum=momentum)
    second_order(
        ours.batch_norm_act,
        x,
        running_mean=actual[0],
        running_var=actual[1],
        training=True,
        momentum=momentum,
    )
    assert_gradients(actual, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_running_statistics_in_float32(dtype: torch.dtype) -> None:
    x, actual, expected = random((64, 3, 4, 4), 1), statistics(torch.float32), statistics()
    F.batch_norm(x, *expected, training=True)
    ours.batch_norm_act(x.to(dtype), *actual, training=True)
    assert actual[0].dtype == torch.float32
    assert_gradients(actual, expected, 1e-6)


def test_evaluation_changes_no_statistics() -> None:
    actual, expected = statistics(), statistics()
    second_order(
        ours.batch_norm_act,
        random((4, 3, 2, 2), 1),
        running_mean=actual[0],
        running_var=actual[1],
        activation="relu",
    )
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_training_works_without_running_statistics() -> None:
    x = random((4, 3, 2, 2), 1)
    y = ours.batch_norm_act(x, None, None, training=True, activation="relu6")
    assert_gradients([y], [oracle.batch_norm_act(x, None, None, training=True, activation="relu6")])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_weights_beside_half_precision(dtype: torch.dtype) -> None:
    def gradients(
        operation: Callable[..., Tensor], x_dtype: torch.dtype, w_dtype: torch.dtype
    ) -> list[Tensor]:
        x, w, b = (
            leaf(random((8, 3, 4, 4), 1).to(x_dtype)),
            *(leaf(random((3,), i).to(w_dtype)) for i in (2, 3)),
        )
        y = operation(x, None, None, w, b, training=True, activation="relu")
        first = torch.autograd.grad(y, (x, w, b), random((8, 3, 4, 4), 4).to(x_dtype), create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].double().square().sum(), (x, w))]

    actual = gradients(ours.batch_norm_act, dtype, torch.float32)
    plain = gradients(oracle.batch_norm_act, dtype, torch.float32)
    exact = gradients(oracle.batch_norm_act, torch.float64, torch.float64)
    assert [t.dtype for t in actual] == [t.dtype for t in plain]
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert relative_error(a, e) <= 2 * relative_error(p, e)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_residual_and_probe_measure_the_gradient_at_the_output(activation: str) -> None:
    x, residual, probe = (
        leaf(random((4, 3, 5), 1)),
        leaf(random((4, 3, 5), 2)),
        scalar_probe(torch.zeros(()).double()),
    )
    y = ours.batch_norm_act(
        x, None, None, training=True, residual=residual, activation=activation, probe=probe
    )
    dy = random((4, 3, 5), 3)
    l1, d_residual = torch.autograd.grad(y, (probe, residual), dy, create_graph=True)
    open_ = (
        torch.ones_like(y) if activation == "none" else (y > 0) & (y < {"relu": 1e9, "relu6": 6}[activation])
    )
    assert_gradients([l1, d_residual], [dy.abs().sum(), dy * open_])


def test_a_large_mean_with_a_small_variance_keeps_precision() -> None:
    x = 1000 + 0.01 * random((64, 3, 8, 8), 1)
    actual, plain, exact = (
        operation(x.to(dtype), None, None, training=True)
        for operation, dtype in (
            (ours.batch_norm_act, torch.float32),
            (F.batch_norm, torch.float32),
            (F.batch_norm, torch.float64),
        )
    )
    assert relative_error(actual, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_only_one_of_weight_and_bias_is_trained(trained: str, training: bool) -> None:
    vectors = {"weight": random((3,), 2), "bias": random((3,), 3)}
    vectors[trained] = leaf(vectors[trained])
    wanted = vectors[trained]

    def gradients(operation: Callable[..., Tensor]) -> list[Tensor]:
        x, dy = leaf(random((4, 3, 5), 1)), leaf(random((4, 3, 5), 4))
        y = operation(x, *statistics(), **vectors, training=training, activation="relu")
        first = torch.autograd.grad(y, (x, wanted), dy, create_graph=True)
        penalty = sum(t.square().sum() for t in (y, *first))
        return [*first, *torch.autograd.grad(penalty, (x, wanted, dy))]

    assert_gradients(gradients(ours.batch_norm_act), gradients(oracle.batch_norm_act))


@pytest.mark.usefixtures("each_cpu_backend")
def test_gradients_of_a_nearly_constant_channel_keep_precision() -> None:
    """Its normalised values are zeros; ``x * factor - mean * factor`` leaves what was rounded off."""
    x, dy, v = (random((4, 3, 2, 2), seed) for seed in (1, 2, 3))
    x[:, 1] = 1000
    x = leaf(x)
    weight, bias, cotangent = leaf(random((3,), 4)), leaf(random((3,), 5)), random((3,), 6)
    results = []
    for operation in (ours.batch_norm_act, F.batch_norm):
        y = operation(x, None, None, weight, bias, training=True)
        dy = leaf(dy)
        first = torch.autograd.grad(y, [x, weight], dy, create_graph=True)
        results.append([*first, *torch.autograd.grad(first, [x, weight, dy], [v, cotangent])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    sums = results[0][2].transpose(0, 1).flatten(1)
    assert bool((sums.sum(1).abs() <= 1e-14 * sums.abs().sum(1)).all())
