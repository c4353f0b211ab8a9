"""Computes a network of the grammar part by part for the oracle, with its site inputs and grids.

Nothing of gradl1_fast is used. A site belongs to the layers that are given the very same tensor, and a layer
that is called several times has one site. What goes past the layers is neither quantized nor measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests import oracle
from tests.properties.build import FUNCTIONS, loss
from tests.properties.grammar import Act, Concat, Conv, Network, Norm, Part, Pool, Same, Sum, Twice

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
INPUT = 0
INPUT_BITS = 8
NOISE = 1e-10  # of the largest gradient of a tensor


@dataclass(frozen=True)
class Value:
    """A tensor and its number: a reshaped tensor is another one, that behind an identity is the same."""

    tensor: Tensor
    number: int


class Walk:
    """Calls a plain model as its network says.

    Args:
        network: as data.
        model: made of it; its modules compute, its own forward pass is not used.
        seen: gets layer, number and tensor where a layer is given a tensor for the first time, and returns
            what the layers see.

    Attributes:
        readers: the layers that each tensor is given to, by its number; the input is the first tensor.
        given: those tensors.
        normalised: what went into a batch norm.
        pooled: what a maximum was taken of.
        activated: what went into an activation.
        rounded: in steps, what was rounded to codes and zero points.
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        seen: Callable[[nn.Module, int, Tensor], Tensor] = lambda _, __, t: t,
    ) -> None:
        self.network, self.model, self.seen = network, model, seen
        self.readers: dict[int, list[nn.Module]] = {}
        self.given: dict[int, Tensor] = {}
        self.normalised: list[Tensor] = []
        self.pooled: list[Tensor] = []
        self.activated: list[Tensor] = []
        self.rounded: list[Tensor] = []
        self.data = {INPUT}
        self._count = 0
        self._seen: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        value = self._chain(self.network.parts, self.model.body, self._made(x))
        return self._top(self.model.top, value).tensor

    def _made(self, tensor: Tensor) -> Value:
        self._count += 1
        return Value(tensor, self._count - 1)

    def _layer(self, layer: nn.Module, value: Value) -> Value:
        if value.number not in self._seen:
            self.given[value.number] = value.tensor
            self._seen[value.number] = self.seen(layer, value.number, value.tensor)
        self.readers.setdefault(value.number, []).append(layer)
        return self._made(layer(self._seen[value.number]))

    def _chain(self, parts: tuple[Part, ...], modules: nn.Sequential, value: Value) -> Value:
        for part, module in zip(parts, modules, strict=True):
            value = self._part(part, module, value)
        return value

    def _part(self, part: Part, module: nn.Module, value: Value) -> Value:
        match part:
            case Same():
                return value
            case Conv():
                return self._layer(module, value)
            case Norm():
                self.normalised.append(value.tensor)
                return self._made(module(value.tensor))
            case Pool():
                self.pooled += [value.tensor] * (part.kind == "max")
                return self._made(module(value.tensor))
            case Act():
                self.activated.append(value.tensor)
                return self._made(FUNCTIONS[part.kind](value.tensor))
            case Twice():
                return self._chain(part.parts, module.inner, self._chain(part.parts, module.inner, value))
            case Sum() | Concat():
                left = self._chain(part.left, module.left, value).tensor
                right = self._chain(part.right, module.right, value).tensor
                return self._made(left + right if isinstance(part, Sum) else torch.cat([left, right], 1))

    def _top(self, top: nn.Module, value: Value) -> Value:
        form, before = self.network.head.form, value.number
        if form == "tokens":
            value = self._made(value.tensor.flatten(2).transpose(1, 2))
        elif form in ("pool", "mean"):
            value = self._made(value.tensor.flatten(2).mean(2))
        else:
            value = self._made(value.tensor.flatten(1))
        if before in self.data and form not in ("pool", "mean"):
            self.data.add(value.number)
        for layer in top.layers:
            if isinstance(layer, nn.Linear):
                value = self._layer(layer, value)
                continue
            self.activated.append(value.tensor)
            value = self._made(layer(value.tensor))
        return self._made(value.tensor.mean(1)) if form == "tokens" else value


@dataclass(frozen=True)
class Site:
    """What some layers are given.

    Attributes:
        numbers: of the tensors.
        ends: smallest and largest value of them all.
        is_input: whether its layers are given the data, and nothing else.
    """

    numbers: tuple[int, ...]
    ends: tuple[Tensor, Tensor]
    is_input: bool


@dataclass(frozen=True)
class Layout:
    """What of a network is quantized, found by a pass in evaluation mode.

    Attributes:
        weights: names.
        sites: by the number of each tensor that layers are given.
        data: the numbers of the input, and of the input in another shape.
    """

    weights: tuple[str, ...]
    sites: dict[int, Site]
    data: set[int]

    @property
    def penalised(self) -> list[int]:
        """The numbers of the tensors that a penalty counts: not the data."""
        return [number for number in self.sites if number not in self.data]


def layout(network: Network, model: nn.Module, x: Tensor) -> Layout:
    """Return what of a network is quantized; the model stays as it is."""
    modes = {module: module.training for module in model.modules()}
    walk = Walk(network, model.eval())
    with torch.no_grad():
        walk(x)
    for module, training in modes.items():
        module.training = training
    weights = tuple(f"{name}.weight" for name, m in model.named_modules() if isinstance(m, LAYERS))
    sites = {}
    for numbers in _together(walk.readers):
        low, high = (torch.stack([f(walk.given[n]) for n in numbers]) for f in (torch.min, torch.max))
        site = Site(tuple(numbers), (low.min(), high.max()), walk.data.issuperset(numbers))
        sites.update(dict.fromkeys(numbers, site))
    return Layout(weights, sites, walk.data)


def _together(readers: dict[int, list[nn.Module]]) -> list[list[int]]:
    """Return the numbers of tensors in groups: two are in one if a layer is given both."""
    groups: list[tuple[list[int], set[nn.Module]]] = []
    for number, layers in readers.items():
        touched = [group for group in groups if group[1] & set(layers)]
        groups = [group for group in groups if group not in touched]
        numbers = [n for group in touched for n in group[0]]
        groups.append(([*numbers, number], set(layers).union(*(group[1] for group in touched))))
    return [numbers for numbers, _ in groups]


def measure(
    network: Network,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    found: Layout,
    activation_bits: int | None,
) -> tuple[oracle.Measured, Walk]:
    """Run the plain model with quantized activations; return what a penalty measures, and the pass."""
    kept: dict[str, Tensor] = {}

    def seen(_: nn.Module, number: int, t: Tensor) -> Tensor:
        site, given = found.sites[number], t
        if activation_bits is not None:
            grid = oracle.affine_grid(*site.ends, INPUT_BITS if site.is_input else activation_bits)
            walk.rounded += [t.detach() / grid[0], -site.ends[0] / grid[0]]
            t = oracle.fake_quantize(t, *grid)
        if number not in found.data:
            t = oracle.tap(t) if t.requires_grad else t.detach().requires_grad_()
            t.unquantized = given
            kept[f"site {site.numbers[0]}, tensor {number}"] = t
        return t

    with parametrize.cached():
        walk = Walk(network, model, seen)
        value = loss(walk, data)
        return oracle.Measured(value, {name: _find(model, name) for name in found.weights}, kept), walk


def decided(walk: Walk, measured: oracle.Measured, *, extremes: bool, noise: float = NOISE) -> bool:
    """Say whether rounding decides nothing: where values tie but for rounding, gradients are chance.

    Args:
        walk: after a pass.
        measured: in that pass. The sign of a gradient whose contributions cancel is chance.
        extremes: whether the extremes of activations matter.
        noise: what rounding may amount to, relative to the largest value of a tensor.
    """
    tensors = [*measured.weights.values(), *measured.activations.values()]
    sizes = [g.abs() for g in torch.autograd.grad(measured.loss, tensors, retain_graph=True)]
    if any(bool(((size > 0) & (size < noise * size.max())).any()) for size in sizes):
        return False
    if sum(_has_channel_of_one_value(t) for t in walk.normalised) > 1:
        return False
    if any(_ties(t.flatten(2).flatten(0, 1), noise) for t in walk.pooled):
        return False
    if any(bool(((t - t.floor() - 0.5).abs() < noise).any()) for t in walk.rounded):
        return False
    if any(_meets_kink(t, noise) for t in walk.activated):
        return False
    ranged = [getattr(t, "unquantized", t) for t in measured.activations.values()] if extremes else []
    return not any(
        _ties(torch.stack([t, -t]).flatten(1).topk(min(2, t.numel())).values, noise) for t in ranged
    )


def _has_channel_of_one_value(t: Tensor) -> bool:
    """Say whether a batch norm multiplies rounding by 1 / sqrt(eps), which two of them make 1e5."""
    values = t.detach().transpose(0, 1).flatten(1)
    return bool((values.var(1) < 1e-10).any())


def _meets_kink(t: Tensor, noise: float) -> bool:
    """Say whether a value before a ReLU or ReLU6 is almost at its end; zeros out of another ReLU are not."""
    t = t.detach()
    near = torch.stack([t, t - 6]).abs()
    activated = bool(t.min() >= 0)  # otherwise products of codes that cancel, exactly or almost
    return bool(((near < noise * t.abs().max()) & ((near > 0) | (not activated))).any())


def _ties(rows: Tensor, noise: float) -> bool:
    """Say whether a row has two values that are almost the same, and not the end of a ReLU or ReLU6."""
    rows = rows.detach().sort(1).values
    near = rows.diff(dim=1) <= noise * rows.abs().max()
    return bool((near & (rows[:, 1:] != 0) & (rows[:, 1:].abs() != 6)).any())


def quantize_weights(model: nn.Module, names: tuple[str, ...], bits: int, *, per_channel: bool) -> None:
    """Fake-quantize the named weights of a plain model in place, each in its own range."""
    limit = max(2 ** (bits - 1) - 1, 1)
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        scale = oracle.symmetric_step(layer.weight.detach(), bits, per_channel=per_channel)
        grid = scale.flatten() if per_channel else scale
        quantizer = oracle.FakeQuantize(
            grid, torch.zeros_like(grid), -limit, limit, 0 if per_channel else None
        )
        parametrize.register_parametrization(layer, "weight", quantizer)


def _find(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name.removesuffix(".weight")).weight
