"""Operations prepared for a shape against the sweeps of the same backend, and their ends against autograd.

The results of prepared calls must be those of the sweeps to the last bit. The ends are compared with
``torch.amin`` and ``torch.amax``, their gradients with what autograd gives in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from gradl1_fast.backends import contract
from tests.compiled.calls import ACTIVATIONS, Layout, sums

CODES = (0, 15)
# Of gradients that a prepared call rounds once, and PyTorch's operations before the sweeps several times.
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 4e-2, torch.float16: 4e-3}
Kind = tuple[bool, str, bool]
KINDS: list[Kind] = list(itertools.product((True, False), ACTIVATIONS, (False, True)))


def sweeps_of(backend: Any) -> ModuleType:
    """Return the backend without what it prepares itself."""
    names = {name: getattr(backend, name) for name in dir(backend) if not name.startswith("prepare_")}
    return cast(ModuleType, SimpleNamespace(**names))


def assert_same(actual: Any, expected: Any, name: str) -> None:
    """Compare results bit for bit; NaN equals NaN, and None is None."""
    for i, (a, e) in enumerate(zip(_listed(actual), _listed(expected), strict=True)):
        assert (a is None) == (e is None), f"{name}, {i}"
        if a is not None:
            torch.testing.assert_close(
                a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{name}, {i}: {m}"
            )


def _listed(result: Any) -> list[Tensor | None]:
    return list(result) if isinstance(result, tuple) else [result]


class Arguments:
    """Random arguments of every call, for a shape, a type and a layout."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout, device: torch.device | str = "cpu"
    ) -> None:
        self.x, self.dy, self.v, self.u, self.residual = (
            layout((2 * torch.randn(shape)).to(dtype)) for _ in range(5)
        )
        wide = sums(dtype)
        self.weight, self.bias, self.mean, self.var, self.gw, self.gb = (
            (torch.rand(shape[1]) + 0.5).to(wide) for _ in range(6)
        )
        self.bias = self.bias - 1
        self.c, self.d_ends = torch.tensor(-0.7, dtype=wide), torch.tensor([0.3, -1.7], dtype=wide)
        self.scale, self.zero = torch.tensor(0.23, dtype=wide), torch.tensor(5.0, dtype=wide)
        for name, tensor in list(vars(self).items()):
            setattr(self, name, tensor.to(device))


def batch_norm_acts(
    a: Arguments, backend: Any, *, ends: bool, quantized: bool, kinds: Sequence[Kind] = KINDS
) -> Iterator[tuple[str, Any, Any, tuple[Any, ...]]]:
    """Yield for each kind a name, the operation prepared and by its sweeps, and arguments of its forward."""
    for training, activation, added in kinds:
        options = {
            "training": training,
            "eps": 1e-5,
            "activation": activation,
            "with_residual": added,
            "codes": CODES if quantized else None,
            "with_ends": ends,
        }
        like = a.x.resolve_neg()
        own = contract.prepare_batch_norm_act(backend, like, **options)  # type: ignore[arg-type]
        generic = contract.prepare_batch_norm_act(sweeps_of(backend), like, **options)  # type: ignore[arg-type]
        grid = (a.scale, a.zero) if quantized else (None, None)
        statistics = (None, None) if training else (a.mean, a.var)
        residual = a.residual if added else None
        yield (
            f"{a.x.shape}, {a.x.dtype}, {options}",
            own,
            generic,
            (a.x, a.weight, a.bias, *statistics, residual, *grid),
        )


def assert_batch_norm_act(
    a: Arguments, backend: Any, *, quantized: bool, kinds: Sequence[Kind] = KINDS
) -> None:
    """Check the three calls against the sweeps, with every gradient and with few of them."""
    for name, own, generic, forward in batch_norm_acts(
        a, backend, ends=False, quantized=quantized, kinds=kinds
    ):
        result = own.forward(*forward)
        assert_same(result, generic.forward(*forward), f"forward of {name}")
        y, kept, mean, rstd, _ = result
        saved = (a.dy, a.x, y if kept is None else kept, a.weight, a.bias, mean, rstd, *forward[-2:])
        for with_l1 in (True, False):
            backward = (*saved, with_l1, None, None)
            first = own.backward(*backward)
            assert_same(first, generic.backward(*backward), f"backward of {name}")
        u = None if first[3] is None else a.u
        for cotangents in ((a.v, a.gw, a.gb, u, a.c), (a.v, *[None] * 4), (None, a.gw, None, None, a.c)):
            assert_same(
                own.double_backward(*cotangents, *saved),
                generic.double_backward(*cotangents, *saved),
                f"double backward of {name}",
            )


def assert_sites(a: Arguments, backend: Any) -> None:
    """Check the tap and fake quantization against the sweeps."""
    own: Any = contract.prepare_tap(backend, a.x)
    generic: Any = contract.prepare_tap(sweeps_of(backend), a.x)
    assert_same(own.backward(a.dy), generic.backward(a.dy), "tap backward")
    for call in ((a.v, a.c, a.dy), (a.v, None, a.dy), (None, a.c, a.dy)):
        assert_same(own.double_backward(*call), generic.double_backward(*call), "tap double")
    own = contract.prepare_fake_quantize(backend, a.x, CODES)
    generic = contract.prepare_fake_quantize(sweeps_of(backend), a.x, CODES)
    grid: Any = (a.x, a.scale, a.zero)
    assert_same(own.forward(*grid), generic.forward(*grid), "fake quantize")
    for with_l1 in (True, False):
        backward = (a.dy, *grid, with_l1)
        assert_same(own.backward(*backward), generic.backward(*backward), "fake quantize backward")
    for v, c in ((a.v, a.c), (a.v, None), (None, a.c)):
        call = (v, c, a.dy, *grid)
        assert_same(own.double_backward(*call), generic.double_backward(*call), "fake quantize double")


def assert_ends(a: Arguments, backend: Any, tolerance: float, kinds: Sequence[Kind] = KINDS) -> None:
    """Check the ends of y exactly, and their gradient within rounding."""
    for name, own, generic, forward in batch_norm_acts(a, backend, ends=True, quantized=False, kinds=kinds):
        result = own.forward(*forward)
        y, _, mean, rstd, ends = result
        assert_same(ends, true_ends(y), f"ends of {name}")
        assert_same(result, generic.forward(*forward), f"forward of {name}")
        saved = (a.dy, a.x, y, a.weight, a.bias, mean, rstd, None, None)
        for with_l1 in (True, False):
            call = (*saved, with_l1, ends, a.d_ends)
            for i, (actual, expected) in enumerate(
                zip(own.backward(*call), generic.backward(*call), strict=True)
            ):
                assert (actual is None) == (expected is None), f"{i} of {name}"
                if actual is not None:
                    assert_close(actual, expected, tolerance, f"backward, {i} of {name}")
    assert_ends_of_tap(a, backend, tolerance)


def assert_ends_of_tap(a: Arguments, backend: Any, tolerance: float) -> None:
    """Check the ends of a tensor with and without ties, and their gradient within rounding."""
    tap = contract.prepare_tap(backend, a.x)
    for x in (a.x, a.x.relu()):
        ends = tap.ends(x)
        assert_same(ends, true_ends(x), "ends of a tap")
        for dy in (a.dy, None):
            expected = contract.prepare_tap(sweeps_of(backend), x).add_ends_gradient(dy, x, ends, a.d_ends)
            assert_close(
                tap.add_ends_gradient(dy, x, ends, a.d_ends), expected, tolerance, "gradient of ends"
            )

    _assert_taps([a.x, a.x.relu(), a.dy], [a.dy, None, a.v], a.d_ends, backend)


def _assert_taps(xs: list[Tensor], dys: list[Tensor | None], d_ends: Tensor, backend: Any) -> None:
    """Check the taps of several tensors against those of each."""
    own = contract.prepare_taps(backend, xs)
    generic = contract.Taps([contract.prepare_tap(backend, x) for x in xs])
    ends = own.ends(xs)
    assert_same(ends, generic.ends(xs), "ends of taps")
    d_ends = torch.stack([(i + 1) * d_ends for i in range(len(xs))])
    for given in (dys, [None] * len(xs)):
        actual, expected = (taps.add_ends_gradients(given, xs, ends, d_ends) for taps in (own, generic))
        assert_same(tuple(actual), tuple(expected), "gradients of ends")


def true_ends(y: Tensor) -> Tensor:
    """Return the ends by PyTorch's own reductions."""
    low, high = y.amin(), y.amax()
    return torch.stack([t.to(sums(y.dtype)) for t in (low, high, (y == low).sum(), (y == high).sum())])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert (actual.dtype, actual.shape, actual.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    ), name
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * max(float(expected.double().abs().max()), 1.0), f"{name}: off by {error:.3g}"
