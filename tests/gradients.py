"""The assertion for gradients: shape, direction, signed bias and closeness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


def assert_gradients(actual: Gradients, expected: Gradients, rtol: float = 1e-10) -> None:
    """Compare pairwise; ``None`` counts as zero.

    Closeness alone is measured against the largest element, which would let a wrong pattern of small
    ones and a small systematic offset pass.
    """
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_gradient(a, e, rtol, f"gradient {i}")


def assert_gradient(actual: Tensor | None, expected: Tensor | None, rtol: float, name: str = "") -> None:
    if actual is None or expected is None:
        present = actual if expected is None else expected
        assert present is None or not present.any(), f"{name}: one is absent, the other is not zero"
        return
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    a, e = actual.detach().double(), expected.detach().double()
    assert a.isfinite().all(), f"{name}: not finite"
    if a.numel() == 0:
        return
    error = (a - e).abs().max()
    assert error <= rtol * e.abs().max(), f"{name}: off by {error:.3g} of at most {e.abs().max():.3g}"
    assert direction(a, e) >= 1 - rtol, f"{name}: direction, 1 - cosine = {1 - direction(a, e):.3g}"
    bias = (a - e).sum().abs()
    assert bias <= rtol * e.abs().sum(), f"{name}: signed bias {bias:.3g} of {e.abs().sum():.3g}"


def direction(a: Tensor, e: Tensor) -> float:
    """Return the cosine of the angle between two tensors; 1 where both are zero."""
    if not a.any() and not e.any():
        return 1.0
    unit_a, unit_e = (t.flatten() / torch.linalg.vector_norm(t) for t in (a, e))
    return float(unit_a @ unit_e)


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """Return the root mean square error of a result, relative to the size of what was expected."""
    if actual is None or expected is None:
        assert_gradient(actual, expected, 0.0)
        return 0.0
    assert actual.shape == expected.shape
    a, e = actual.detach().double(), expected.detach().double()
    return float((a - e).norm() / e.norm().clamp(min=1e-300))
