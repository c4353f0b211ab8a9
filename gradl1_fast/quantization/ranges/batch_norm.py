"""Activation ranges without data: from what batch norms say of their outputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast import _checks as check
from gradl1_fast.conversion.graphs import module_of, operation_of
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_quantizers

__all__ = ["BatchNormStatistics", "Gaussian"]

_CLIPS = {"none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
_functional = nn.functional
_RELU = {torch.relu, _functional.relu, "relu"}
_ADD = {operator.add, torch.add, "add"}

# What hands values on, or takes the largest or the mean of some: no value lies beyond those before.
_WITHIN_MODULES = (
    *(nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
_WITHIN_NAMES = (
    *("adaptive_avg_pool2d", "adaptive_max_pool2d", "amax", "avg_pool2d", "contiguous", "dropout", "flatten"),
    *("max_pool2d", "mean", "reshape", "squeeze", "unsqueeze", "view"),
)


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians, one for each channel, clipped to ``[low, high]``.

    Attributes:
        mean: before clipping, float64.
        variance: before clipping.
        low: values below are moved here.
        high: values above are moved here.
    """

    mean: Tensor
    variance: Tensor
    low: float = -math.inf
    high: float = math.inf

    def clip(self, low: float, high: float) -> Gaussian:
        """Return this, clipped once more."""
        return Gaussian(self.mean, self.variance, max(self.low, low), min(self.high, high))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance after clipping.

        Source: the moments of a doubly truncated Gaussian, plus the mass at the two ends.
        """
        low = torch.full_like(self.mean, self.low).clamp(min=-1e30)
        high = torch.full_like(self.mean, self.high).clamp(max=1e30)
        sigma = self.variance.sqrt().clamp(min=1e-300)
        a, b = (low - self.mean) / sigma, (high - self.mean) / sigma
        below, above = _cdf(a), _cdf(-b)
        inside = 1 - below - above
        # Around the mean, so that nothing cancels; an end that is infinite has no mass.
        first = sigma * (_density(a) - _density(b)) + _times(low - self.mean, below)
        first = first + _times(high - self.mean, above)
        second = sigma.square() * (inside + _times(a, _density(a)) - _times(b, _density(b)))
        second = second + _times((low - self.mean).square(), below)
        second = second + _times((high - self.mean).square(), above)
        return self.mean + first, (second - first.square()).clamp(min=0)

    def add(self, other: Gaussian) -> Gaussian:
        """Return the sum, as a Gaussian with the moments of the sum of independent values."""
        (mean, variance), (other_mean, other_variance) = self.moments(), other.moments()
        return Gaussian(mean + other_mean, variance + other_variance)

    def ends(self, sigmas: float) -> tuple[float, float]:
        """Return the range, over all channels, of ``sigmas`` standard deviations around the means."""
        reach = sigmas * self.variance.sqrt()
        lowest, highest = float((self.mean - reach).min()), float((self.mean + reach).max())
        return (min(max(end, self.low), self.high) for end in (lowest, highest))  # type: ignore[return-value]


class BatchNormStatistics:
    """Ranges without data: the largest ``beta + sigmas * |gamma|`` over the channels of a batch norm.

    A batch norm's output is taken as a Gaussian with mean beta and standard deviation gamma in each
    channel; the lower end is the smallest ``beta - sigmas * |gamma|``. A ReLU clips below at 0, ReLU6 also
    above at 6. A sum of branches is the sum of independent Gaussians, with the moments of the clipped
    ones where a branch was activated. Pooling and reshaping keep the range. What is not behind a batch
    norm, such as the network's input, has to be given.

    Args:
        sigmas: standard deviations to each side, more than 0.
        known: ends of the ranges that are given, by the name of the quantizer.

    Source: Nagel et al. 2019, arXiv 1906.04721, and section 5 of arXiv 2002.07520.
    """

    for_weights = False

    def __init__(self, sigmas: float = 6.0, known: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.sigmas = check.coefficient("sigmas", sigmas)
        if not self.sigmas:
            raise ValueError("sigmas must be more than 0")
        self.known = dict(known or {})

    def ranges(self, model: nn.Module) -> dict[str, tuple[float, float]]:
        """Return the ends of the range of every activation quantizer of a converted model, by name.

        Raises:
            ValueError: the model was not traced, a known name is none of its quantizers, or nothing is
                known of what reaches a quantizer; all such are named.
        """
        if not isinstance(model, ConvertedModel):
            raise ValueError("ranges from batch norms need a model that convert could trace; use data")
        names = named_quantizers(model)
        unknown = self.known.keys() - names.keys()
        if unknown:
            raise ValueError(
                f"known: no quantizer is called {', '.join(sorted(unknown))}; there are {list(names)}"
            )
        found = {name: g.ends(self.sigmas) for name, g in _follow(model).items()} | self.known
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"no batch norm says what reaches {', '.join(missing)}; give the ranges as "
                f"BatchNormStatistics(known={{{missing[0]!r}: (low, high), ...}}), or calibrate with data"
            )
        return {name: tuple(found[name]) for name in names}  # type: ignore[misc]


def _follow(model: ConvertedModel) -> dict[str, Gaussian]:
    """Return what reaches each quantizer, as far as it is known, by following the graph."""
    values: dict[fx.Node, Gaussian | None] = {}
    found: dict[str, Gaussian] = {}
    names = {id(q): name for name, q in named_quantizers(model).items()}
    seen_twice: set[str] = set()
    for node in model.graph.nodes:
        value = values[node] = _result(model, node, values)
        module = module_of(model, node)
        quantizer = module.quantizer if isinstance(module, BatchNormAct2d) else module
        if isinstance(quantizer, ActivationQuantizer):
            name = names[id(quantizer)]
            if value is None or name in found:
                seen_twice.add(name)
            else:
                found[name] = value
    return {name: value for name, value in found.items() if name not in seen_twice}


def _result(model: nn.Module, node: fx.Node, values: Mapping[fx.Node, Gaussian | None]) -> Gaussian | None:
    inputs = [values.get(n) for n in node.all_input_nodes]
    module, operation = module_of(model, node), operation_of(node)
    if isinstance(module, _BatchNorm):
        return _normalised(module, inputs[1:])
    if operation in _ADD:
        return _sum(inputs) if len(inputs) == len(node.args) == 2 else None
    if operation is torch.cat:
        return _joined(inputs, node)
    if not inputs or inputs[0] is None:
        return None
    clip = _clip(module, operation)
    if clip is not None:
        return inputs[0].clip(*clip)
    name = getattr(operation, "__name__", operation)
    same = isinstance(module, (*_WITHIN_MODULES, ActivationQuantizer)) or name in _WITHIN_NAMES
    return inputs[0] if same else None


def _normalised(norm: _BatchNorm, residuals: list[Gaussian | None]) -> Gaussian | None:
    device = next((t.device for t in (*norm.parameters(), *norm.buffers())), None)
    channels = norm.num_features
    beta = torch.zeros(channels, device=device) if norm.bias is None else norm.bias.detach()
    gamma = torch.ones(channels, device=device) if norm.weight is None else norm.weight.detach()
    value: Gaussian | None = Gaussian(beta.double(), gamma.double().square())
    for residual in residuals:
        value = _sum([value, residual])
    if not isinstance(norm, BatchNormAct2d) or value is None:
        return value
    return value.clip(*_CLIPS[norm.activation])


def _sum(terms: list[Gaussian | None]) -> Gaussian | None:
    a, b = terms
    if a is None or b is None or a.mean.shape != b.mean.shape:
        return None
    return a.add(b)


def _joined(parts: list[Gaussian | None], node: fx.Node) -> Gaussian | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    present = [part for part in parts if part is not None]
    if dim != 1 or len(present) < len(parts) or len({(p.low, p.high) for p in present}) != 1:
        return None
    means, variances = (torch.cat([getattr(p, key) for p in present]) for key in ("mean", "variance"))
    return Gaussian(means, variances, present[0].low, present[0].high)


def _clip(module: nn.Module | None, operation: Any) -> tuple[float, float] | None:
    if isinstance(module, nn.ReLU) or operation in _RELU:
        return _CLIPS["relu"]
    return _CLIPS["relu6"] if isinstance(module, nn.ReLU6) or operation is _functional.relu6 else None


def _cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _density(x: Tensor) -> Tensor:
    return (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)


def _times(x: Tensor, mass: Tensor) -> Tensor:
    """Return the product, and 0 where there is no mass, whatever ``x`` is."""
    return torch.where(mass == 0, 0.0, x * mass)
