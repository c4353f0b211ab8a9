"""Activation ranges without data, from the parameters of batch norms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradl1_fast import _checks as check
from gradl1_fast.conversion.graphs import (
    ADDITIONS,
    activation_of,
    changes_in_place,
    layer_of,
    module_of,
    operation_of,
)
from gradl1_fast.conversion.tracing import parts_of
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.nn.sites import named_quantizers

__all__ = ["BatchNormStatistics", "Gaussian"]

_CLIPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Operations that return values, or the maximum or mean of values, so that the range does not grow.
_WITHIN_MODULES = (
    *(nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd),
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd),
)
_WITHIN_NAMES = (
    *("adaptive_avg_pool2d", "adaptive_max_pool2d", "amax", "avg_pool2d", "contiguous", "dropout", "flatten"),
    *("max_pool2d", "mean", "reshape", "squeeze", "unsqueeze", "view"),
)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Independent Gaussians, one per channel, clipped to ``[low, high]``.

    Attributes:
        mean: the mean before clipping, float64.
        variance: the variance before clipping.
        low: smaller values are clipped to it.
        high: larger values are clipped to it.
    """

    mean: Tensor
    variance: Tensor
    low: float = -math.inf
    high: float = math.inf

    def clip(self, low: float, high: float) -> Gaussian:
        """Return the distribution clipped again."""
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
        # Around the mean, to avoid cancellation; an infinite end has no mass.
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
        """Return the range over all channels of ``sigmas`` standard deviations around the means."""
        reach = sigmas * self.variance.sqrt()
        lowest, highest = float((self.mean - reach).min()), float((self.mean + reach).max())
        return (min(max(end, self.low), self.high) for end in (lowest, highest))  # type: ignore[return-value]


class BatchNormStatistics:
    """Ranges without data, from ``beta ± sigmas * |gamma|`` over the channels of a batch norm.

    Each channel of a batch norm's output is modelled as a Gaussian with mean beta and standard deviation
    gamma. The range is from the smallest ``beta - sigmas * |gamma|`` to the largest ``beta + sigmas *
    |gamma|``. ReLU clips below at 0, and ReLU6 also above at 6. A sum of branches is modelled as the sum of
    independent Gaussians, with the moments after clipping if a branch was activated. Pooling and reshaping
    keep the range. The operations after a batch norm are found by tracing the model or its parts. The ranges
    of tensors that do not follow a batch norm, such as the network's input, must be given, as must those that
    follow a subclass of a batch norm, which may compute more.

    Args:
        sigmas: number of standard deviations on each side, more than 0.
        known: given ranges, by the name of the site.

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
            ValueError: a name in ``known`` is not a site, or the range of a site cannot be determined; the
                message names all such sites.
        """
        names = named_quantizers(model)
        unknown = self.known.keys() - names.keys()
        if unknown:
            raise ValueError(f"known: unknown site {', '.join(sorted(unknown))}; the sites are {list(names)}")
        distributions = {name: g.ends(self.sigmas) for name, g in _follow(model).items()} | self.known
        missing = [name for name in names if name not in distributions]
        if missing:
            raise ValueError(
                f"no batch norm describes the values at {', '.join(missing)}; give the ranges as "
                f"BatchNormStatistics(known={{{missing[0]!r}: (low, high), ...}}), or calibrate with data"
            )
        return {name: tuple(distributions[name]) for name in names}  # type: ignore[misc]


def _follow(model: nn.Module) -> dict[str, Gaussian]:
    """Return the distribution at each site, if it can be determined from the graphs."""
    names = {id(q): name for name, q in named_quantizers(model).items()}
    distributions: dict[str, set[Gaussian | None]] = {}
    for part in parts_of(model):
        if part.traced is not None:
            for quantizer, value in _reaching(part.container, part.traced.graph):
                distributions.setdefault(names[id(quantizer)], set()).add(value)
    alone = {name: values.pop() for name, values in distributions.items() if len(values) == 1}
    return {name: value for name, value in alone.items() if value is not None}


def _reaching(root: nn.Module, graph: fx.Graph) -> Iterator[tuple[ActivationQuantizer, Gaussian | None]]:
    """Yield the quantizer of each call of a layer, and each quantizer without a layer, with its input."""
    values: dict[fx.Node, Gaussian | None] = {}
    changed = {node.all_input_nodes[0] for node in graph.nodes if _changes_for_others(root, node)}
    for node in graph.nodes:
        value = _result(root, node, values)
        values[node] = None if node in changed else value
        layer, module = layer_of(root, node), module_of(root, node)
        quantizer = module if layer is None else layer.input_quantizer
        if isinstance(quantizer, ActivationQuantizer) and node.all_input_nodes:
            yield quantizer, values[node.all_input_nodes[0]]


def _changes_for_others(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a node may change a tensor that has other readers."""
    shared = bool(node.all_input_nodes) and len(node.all_input_nodes[0].users) > 1
    return shared and changes_in_place(root, node)


def _result(root: nn.Module, node: fx.Node, values: Mapping[fx.Node, Gaussian | None]) -> Gaussian | None:
    inputs = [values.get(n) for n in node.all_input_nodes]
    module, operation = module_of(root, node), operation_of(node)
    if type(module) in _NORMS:
        return _normalised(module)  # type: ignore[arg-type]
    if operation in ADDITIONS:
        return _sum(inputs) if len(inputs) == len(node.args) == 2 else None
    if operation is torch.cat:
        return _joined(inputs, node)
    if not inputs or inputs[0] is None:
        return None
    activation = activation_of(root, node)
    if activation is not None:
        return inputs[0].clip(*_CLIPS[activation])
    name = getattr(operation, "__name__", operation)
    same = isinstance(module, (*_WITHIN_MODULES, ActivationQuantizer)) or name in _WITHIN_NAMES
    return inputs[0] if same else None


def _normalised(norm: _BatchNorm) -> Gaussian:
    device = next((t.device for t in (*norm.parameters(), *norm.buffers())), None)
    channels = norm.num_features
    beta = torch.zeros(channels, device=device) if norm.bias is None else norm.bias.detach()
    gamma = torch.ones(channels, device=device) if norm.weight is None else norm.weight.detach()
    return Gaussian(beta.double(), gamma.double().square())


def _sum(terms: list[Gaussian | None]) -> Gaussian | None:
    a, b = terms
    if a is None or b is None or a.mean.shape != b.mean.shape:
        return None
    return a.add(b)


def _joined(parts: list[Gaussian | None], node: fx.Node) -> Gaussian | None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    distributions = [distribution for distribution in parts if distribution is not None]
    if dim != 1 or len(distributions) < len(parts) or len({(p.low, p.high) for p in distributions}) != 1:
        return None
    means, variances = (torch.cat([getattr(p, key) for p in distributions]) for key in ("mean", "variance"))
    return Gaussian(means, variances, distributions[0].low, distributions[0].high)


def _cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _density(x: Tensor) -> Tensor:
    return (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)


def _times(x: Tensor, mass: Tensor) -> Tensor:
    """Return the product, and 0 for zero mass even if ``x`` is infinite."""
    return torch.where(mass == 0, 0.0, x * mass)
