"""Operations that the CPU loops prepare for a shape."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradl1_fast.backends import contract, reference
from tests.compiled.prepared import (
    ROUNDING,
    Arguments,
    assert_batch_norm_act,
    assert_ends,
    assert_same,
    assert_sites,
    batch_norm_acts,
    sweeps_of,
    true_ends,
)
from tests.ops.layouts import LAYOUTS, channels_last

SHAPES = [(2, 4, 8, 8), (3, 19, 7, 5), (2, 300, 3, 1), (6, 3), (2, 5, 3, 2, 4), (5, 7, 41, 37)]
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


@DTYPES
@pytest.mark.parametrize(
    "layout", [Tensor.contiguous, channels_last, LAYOUTS["transposed"], LAYOUTS["sliced"]]
)
def test_prepared_calls_have_the_bits_of_the_sweeps(
    dtype: torch.dtype, layout: Any, host: ModuleType
) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        a = Arguments(shape, dtype, layout)
        assert_sites(a, host)
        for quantized in (False, True):
            assert_batch_norm_act(a, host, quantized=quantized)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last", "constant"])
def test_gradients_may_come_in_any_layout(layout: str, host: ModuleType) -> None:
    a = Arguments((3, 4, 6, 5), torch.float32, Tensor.contiguous)
    expected = Arguments((3, 4, 6, 5), torch.float32, Tensor.contiguous)
    for name in ("dy", "v", "u", "residual"):
        changed = LAYOUTS[layout](getattr(a, name))
        setattr(a, name, changed)
        setattr(expected, name, changed.contiguous())
    for name in ("x", "weight", "bias", "gw", "gb", "mean", "var"):
        setattr(expected, name, getattr(a, name))
    _assert_equal_results(a, expected, host)


def test_gradients_and_vectors_may_be_negative_views_of_another_type(host: ModuleType) -> None:
    a = Arguments((3, 4, 6, 5), torch.float32, channels_last)
    expected = Arguments((3, 4, 6, 5), torch.float32, channels_last)
    for name in ("x", "dy", "v", "u", "residual"):
        setattr(expected, name, getattr(a, name).neg())
        setattr(a, name, torch._neg_view(getattr(a, name)))
    for name in ("weight", "bias", "gw", "gb", "mean", "var"):
        half = getattr(a, name).bfloat16()
        setattr(a, name, half.repeat_interleave(2)[::2])
        setattr(expected, name, half.float())
    _assert_equal_results(a, expected, host)


def _assert_equal_results(a: Arguments, expected: Arguments, host: ModuleType) -> None:
    for quantized in (False, True):
        pairs = zip(
            batch_norm_acts(a, host, ends=False, quantized=quantized),
            batch_norm_acts(expected, host, ends=False, quantized=quantized),
            strict=True,
        )
        for (name, own, _, forward), (_, _, generic, plain) in pairs:
            results = []
            for op, b, arguments in ((own, a, forward), (generic, expected, plain)):
                y, kept, mean, rstd, _ = op.forward(*arguments)
                saved = (
                    b.dy,
                    b.x,
                    y if kept is None else kept,
                    b.weight,
                    b.bias,
                    mean,
                    rstd,
                    *arguments[-2:],
                )
                first = op.backward(*saved, True, None, None)
                u = None if first[3] is None else b.u
                results.append((y, *first, *op.double_backward(b.v, b.gw, b.gb, u, b.c, *saved)))
            assert_same(results[0], results[1], name)


@DTYPES
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last, LAYOUTS["sliced"]])
def test_ends_come_with_y_and_their_gradient_with_dx(
    dtype: torch.dtype, layout: Any, host: ModuleType
) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        assert_ends(Arguments(shape, dtype, layout), host, ROUNDING[dtype])


@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("backend", ["host", "reference"])
def test_the_gradient_of_the_ends_is_that_of_autograd(
    backend: str, activation: str, added: bool, layout: Any, host: ModuleType
) -> None:
    """In float64; of few values, so that several are equal to the extremes."""
    shape = (4, 3, 5, 6)
    x, residual = (layout(torch.randint(-3, 4, shape).double()).requires_grad_() for _ in range(2))
    weight = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    dy, d_ends = layout(torch.randn(shape, dtype=torch.float64)), torch.tensor([0.9, -1.3]).double()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()

    z = F.batch_norm(x, mean, var, weight, bias, False, eps=0.0)
    z = z + residual if added else z
    y = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}[activation](z)
    inputs = (x, weight, bias, *([residual] if added else []))
    objective = (y * dy).sum() + (torch.stack([y.amin(), y.amax()]) * d_ends).sum()
    *truth, total = torch.autograd.grad(objective, (*inputs, y))

    op = contract.prepare_batch_norm_act(
        host if backend == "host" else reference, x.detach(), training=False, eps=0.0, activation=activation,
        with_residual=added, codes=None, with_ends=True,
    )  # fmt: skip
    with torch.no_grad():
        forward = (x, weight, bias, mean, var, residual if added else None, None, None)
        out, _, m, rstd, ends = op.forward(*forward)
        assert ends is not None
        assert ends[2] > 1
        assert ends[3] > 1
        saved = (dy, x, out, weight, bias, m, rstd, None, None)
        dx, dweight, dbias, dresidual, l1 = op.backward(*saved, True, ends, d_ends)
    torch.testing.assert_close(out, y.detach(), rtol=0, atol=0)
    actual = [dx, dweight, dbias, *([dresidual] if added else []), l1]
    torch.testing.assert_close(actual, [*truth, total.abs().sum()], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", [Tensor.contiguous, channels_last])
def test_ends_of_what_is_not_finite_are_those_of_pytorch(value: float, layout: Any, host: ModuleType) -> None:
    x = layout(torch.randn(3, 5, 7, 7))
    x[1, 2, 3, 4] = value
    x[2, 0, 0, 0] = value
    tap = contract.prepare_tap(host, x)
    ends = tap.ends(x)
    assert_same(ends, true_ends(x), "ends")
    leaf, d_ends = x.clone().requires_grad_(), torch.tensor([0.5, 2.0])
    truth = torch.autograd.grad((torch.stack([leaf.amin(), leaf.amax()]) * d_ends).sum(), leaf)[0]
    assert_same(tap.add_ends_gradient(None, x, ends, d_ends), truth, "gradient")


def test_the_bits_do_not_depend_on_threads_or_instruction_set(host: ModuleType, module: Any) -> None:
    before, results = torch.get_num_threads(), []
    cases = [Arguments((9, 40, 33, 17), torch.float32, f) for f in (Tensor.contiguous, channels_last)]
    try:
        for threads, name in [(1, "base"), *((3, name) for name in module.instruction_sets())]:
            torch.set_num_threads(threads)
            module.use_instruction_set(name)
            results.append([t for a in cases for t in _with_ends(a, host)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(tuple(other), tuple(results[0]), "results")


def _with_ends(a: Arguments, host: ModuleType) -> list[Tensor]:
    op = contract.prepare_batch_norm_act(
        host, a.x, training=True, eps=1e-5, activation="relu", with_residual=False, codes=None, with_ends=True
    )
    y, _, mean, rstd, ends = op.forward(a.x, a.weight, a.bias, None, None, None, None, None)
    assert ends is not None
    saved = (a.dy, a.x, y, a.weight, a.bias, mean, rstd, None, None)
    dx, dweight, dbias, _, l1 = op.backward(*saved, True, ends, a.d_ends)
    assert l1 is not None
    return [y, mean, rstd, ends, dx, dweight, dbias, l1]


def test_a_call_asks_torch_for_its_results_and_nothing_else(host: ModuleType) -> None:
    """What a call costs is what it asks of torch."""
    torch.use_deterministic_algorithms(False)  # fills results
    a = Arguments((2, 4, 8, 8), torch.float32, channels_last)
    asked: list[str] = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(str(function))
            return function(*args, **(kwargs or {}))

    def results(call: Any, *arguments: Any) -> int:
        asked.clear()
        with Asked():
            call(*arguments)
        assert set(asked) == {"aten.empty_like.default"}
        return len(asked)

    op = contract.prepare_batch_norm_act(
        host, a.x, training=True, eps=1e-5, activation="relu", with_residual=True, codes=None, with_ends=True
    )
    tap, quantize = contract.prepare_tap(host, a.x), contract.prepare_fake_quantize(host, a.x, (0, 15))
    taps, pair = contract.prepare_taps(host, [a.x, a.x]), [a.x, a.x]
    forward = (a.x, a.weight, a.bias, None, None, a.residual, None, None)
    y, _, mean, rstd, ends = op.forward(*forward)
    saved = (a.dy, a.x, y, a.weight, a.bias, mean, rstd, None, None)
    grid = (a.x, a.scale, a.zero)
    assert results(op.forward, *forward) == 4
    assert results(op.backward, *saved, True, None, None) == 5
    assert results(op.backward, *saved, False, ends, a.d_ends) == 4
    assert results(op.double_backward, a.v, a.gw, a.gb, a.u, a.c, *saved) == 3
    assert results(tap.backward, a.dy) == 1
    assert results(tap.double_backward, a.v, a.c, a.dy) == 1
    assert results(tap.ends, a.x) == 1
    assert results(tap.add_ends_gradient, a.dy, a.x, ends, a.d_ends) == 1
    both = torch.stack([ends, ends]), torch.stack([a.d_ends, a.d_ends])
    assert results(taps.ends, pair) == 1
    assert results(taps.add_ends_gradients, pair, pair, *both) == 2
    assert results(quantize.forward, *grid) == 1
    assert results(quantize.backward, a.dy, *grid, True) == 2
    assert results(quantize.double_backward, a.v, a.c, a.dy, *grid) == 1


def test_two_threads_may_call_one_object(host: ModuleType) -> None:
    """The interpreter's lock is released in a call, and each thread has scratch memory of its own."""
    torch.use_deterministic_algorithms(False)
    inputs = [Arguments((16, 40, 24, 24), torch.float32, channels_last) for _ in range(2)]
    expected = [_with_ends(a, sweeps_of(host)) for a in inputs]
    op = contract.prepare_batch_norm_act(
        host, inputs[0].x, training=True, eps=1e-5, activation="relu", with_residual=False, codes=None,
        with_ends=True,
    )  # fmt: skip
    wrong: list[int] = []

    def call(a: Arguments, truth: list[Tensor]) -> None:
        for _ in range(40):
            _, _, mean, rstd, ends = op.forward(a.x, a.weight, a.bias, None, None, None, None, None)
            wrong.extend(
                i for i, t in ((1, mean), (2, rstd), (3, ends)) if t is None or not torch.equal(t, truth[i])
            )

    workers = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


FLAT = {"dtype": 0, "layout": (1, 1, 8)}
QUANTIZED = {"quantized": True, "code_min": 0, "code_max": 15}
NORM = {
    "dtype": 0, "layout": (4, 2, 1), "training": False, "eps": 1e-5, "activation": 1, "with_residual": True,
    "with_ends": False, **QUANTIZED,
}  # fmt: skip
SETTINGS = {
    "tap": FLAT,
    "fake_quantize": FLAT | {"code_min": 0, "code_max": 15},
    "batch_norm_act": NORM,
}
# Everything that a pass takes: what it needs, what it may go without, what these settings refuse.
FIELDS: dict[str, tuple[str, str, str]] = {
    "tap_ends": ("x ends", "scratch", ""),
    "tap_backward": ("dy l1", "scratch", ""),
    "tap_double_backward": ("d_l1 dy d_dy", "d_dx", ""),
    "tap_add_ends_gradient": ("x ends d_ends total", "dy scratch", ""),
    "fake_quantize_forward": ("x scale zero_point y", "scratch", ""),
    "fake_quantize_backward": ("dy x scale zero_point dx", "l1 scratch", ""),
    "fake_quantize_double_backward": ("dy x scale zero_point d_dy", "d_dx d_l1 scratch", ""),
    "batch_norm_act_forward": (
        "x running_mean running_var residual scale zero_point y activated mean rstd",
        "weight bias ends scratch",
        "",
    ),
    "batch_norm_act_backward": (
        "dy x activated mean rstd scale zero_point dx dweight dbias dresidual",
        "weight bias l1 ends scratch",
        "d_ends",
    ),
    "batch_norm_act_double_backward": (
        "d_dx dy x activated mean rstd scale zero_point d_dy d_x d_weight",
        "d_dweight d_dbias d_dresidual d_l1 weight bias scratch",
        "",
    ),
}
UNUSED = {"ends"}  # of batch norm with these settings


def prepared(name: str, loops: Any, **change: Any) -> Any:
    operation = next(o for o in SETTINGS if name.startswith(o))
    return getattr(loops, f"prepare_{name}")(SETTINGS[operation] | change)


def addresses(name: str, kept: list[Tensor]) -> dict[str, int]:
    """Return memory of its own, kept in a list, for each field that is not refused."""
    needed, spare, _ = FIELDS[name]
    fields = [*needed.split(), *spare.split()]
    kept.extend(torch.zeros(512) for _ in fields)
    return {field: t.data_ptr() for field, t in zip(fields, kept, strict=True)}


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_missing_or_not_aligned_is_named(name: str, loops: Any) -> None:
    kept: list[Tensor] = []
    call, good = prepared(name, loops), addresses(name, kept)
    call((1, 0), **good)
    for field, address in good.items():
        absent = {other: a for other, a in good.items() if other != field}
        if field in FIELDS[name][0].split():
            for given in (absent, good | {field: 0}):
                with pytest.raises(ValueError, match=f"^{field} is missing"):
                    call((1, 0), **given)
        else:
            call((1, 0), **absent)
        if not (name.startswith("batch") and field in UNUSED):
            with pytest.raises(ValueError, match=f"^{field} is not aligned"):
                call((1, 0), **(good | {field: address + 2}))
    for field in FIELDS[name][2].split():
        with pytest.raises(ValueError, match=f"^{field} must be absent"):
            call((1, 0), **good, **{field: good["x"]})


def test_a_cotangent_behind_no_mask_is_refused(loops: Any) -> None:
    kept: list[Tensor] = []
    good = addresses("batch_norm_act_double_backward", kept)
    call = prepared("batch_norm_act_double_backward", loops, activation=0, quantized=False)
    with pytest.raises(ValueError, match=r"^d_dresidual must be absent"):
        call((1, 0), **good)


def test_names_may_come_in_any_order_and_unknown_ones_are_refused(loops: Any) -> None:
    dy, one, two = torch.tensor([1.0, -2.0] * 4), torch.zeros(1), torch.zeros(1)
    call = prepared("tap_backward", loops)
    call((1, 0), dy=dy.data_ptr(), l1=one.data_ptr())
    built = "".join(["l", "1"])  # a name that is another object than the interned one
    call((1, 0), **{built: two.data_ptr(), "dy": dy.data_ptr()})
    assert one.item() == two.item() == 12
    good = {"dy": dy.data_ptr(), "l1": one.data_ptr()}
    for where, arguments, message in (
        ((1, 0), good | {"dx": 0}, "tap_backward has no field dx"),
        (1, good, "where must be"),
        ((1,), good, "where must be"),
        ((1, 0), good | {"dy": dy}, "integer"),
    ):
        with pytest.raises(TypeError, match=message):
            call(where, **arguments)
    with pytest.raises(TypeError, match="takes where, and every field by name"):
        call((1, 0), *good.values())
    with pytest.raises(OverflowError):
        call((1, 0), **(good | {"dy": -8}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tap_backward", {"dtype": 4}, "dtype tag 4"),
        ("tap_backward", {"layout": (1, 1, 0)}, "no elements"),
        ("tap_backward", {"layout": (1, 1, -1)}, "negative"),
        ("tap_backward", {"numel": 8}, "and no others"),
        ("fake_quantize_forward", {"layout": (1, 1, 2**62)}, "too large"),
        ("batch_norm_act_forward", {"layout": (4, 2)}, "layout must be"),
        ("batch_norm_act_forward", {"activation": 3}, "activation tag 3"),
        ("batch_norm_act_forward", {"with_ends": True}, "exclude each other"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    name: str, change: dict[str, Any], message: str, loops: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(name, loops, **change)
