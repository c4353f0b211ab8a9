"""Float64 truth by ordinary automatic differentiation. It imports nothing of gradl1_fast.

The first half are the operations in plain PyTorch; the second computes the loss, the penalty and the
total gradient of any plain network by ``create_graph=True``, term by term as the paper writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle


def tap(x: Tensor) -> Tensor:
    return x * 1


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None = None
) -> Tensor:
    """Round to the grid; the gradient passes between the ends of the grid, half a step further out."""
    if axis is not None:
        shape = [x.shape[i] if i == axis % x.dim() else 1 for i in range(x.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    steps = torch.round(x.detach() / scale)
    inside = (steps + zero_point >= q_min) & (steps + zero_point <= q_max)
    rounded = scale * torch.minimum(torch.maximum(steps, q_min - zero_point), q_max - zero_point)
    passing = torch.where(inside, x, 0)  # an infinity minus itself would be NaN
    return passing - passing.detach() + rounded


def l1_norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.abs().sum() for t in tensors])


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry: object) -> Tensor:
    return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()](x, weight, bias, **geometry)


def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None, **geometry: object) -> Tensor:
    functions = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
    return functions[weight.dim()](x, weight, bias, **geometry)


linear = F.linear


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "none",
    grid: tuple[Tensor, Tensor, int, int] | None = None,
    **options: object,
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, **options)
    y = y if residual is None else y + residual
    y = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}[activation](y)
    return y if grid is None else fake_quantize(y, *grid)


class FakeQuantize(nn.Module):
    """Fake quantization as a layer, or as a parametrization of a weight."""

    def __init__(self, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int, axis: int | None = None):
        super().__init__()
        self.grid = (scale, zero_point, q_min, q_max, axis)

    def forward(self, x: Tensor) -> Tensor:
        result = fake_quantize(x, *self.grid)
        result.unquantized = x  # whose range it is that a step is measured by
        return result


@dataclass(frozen=True)
class Measured:
    """What a network computes in one step: its loss, and the tensors whose gradients are penalised."""

    loss: Tensor
    weights: dict[str, Tensor]
    activations: dict[str, Tensor]


@dataclass(frozen=True)
class Penalised:
    """Loss, penalty, its unweighted terms ``sum |dL/dT|``, and the gradient of loss + penalty."""

    loss: Tensor
    penalty: Tensor
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def penalised_gradients(
    model_fn: Callable[[], Measured],
    parameters: dict[str, Tensor],
    *,
    lambda_w: float,
    lambda_a: float,
    scale: str = "none",
    weight_bits: int = 4,
    activation_bits: int = 4,
    per_channel: bool = False,
) -> Penalised:
    """Differentiate ``loss + lambda_w * sum |dL/dW| + lambda_a * sum |dL/dY|``.

    Args:
        model_fn: computes the network from ``parameters``; see :func:`measure` for an ``nn.Module``.
            A quantized weight is the tensor that the layer used, not the parameter behind it.
        parameters: the leaves to differentiate with respect to.
        lambda_w: factor of the terms of the weights.
        lambda_a: factor of the terms of the activations.
        scale: "step" multiplies each term by the tensor's quantization step, a function of the tensor.
        weight_bits: width at which the step of a weight is taken, on a symmetric grid.
        activation_bits: width at which the step of an activation is taken, on an affine grid.
        per_channel: a step for each output channel of a weight.
    """
    measured = model_fn()
    sites = [
        (n, t, lambda_w, symmetric_step(_unquantized(t), weight_bits, per_channel=per_channel))
        for n, t in measured.weights.items()
    ]
    sites += [
        (n, t, lambda_a, affine_step(_unquantized(t), activation_bits))
        for n, t in measured.activations.items()
    ]
    gradients = torch.autograd.grad(measured.loss, [t for _, t, _, _ in sites], create_graph=True)
    penalty = torch.zeros_like(measured.loss)
    terms = {}
    for (name, _, factor, step), gradient in zip(sites, gradients, strict=True):
        norm = gradient.abs().sum()
        penalty = penalty + factor * ((gradient.abs() * step).sum() if scale == "step" else norm)
        terms[name] = norm.detach()
    total = torch.autograd.grad(
        measured.loss + penalty, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return Penalised(
        measured.loss.detach(), penalty.detach(), terms, dict(zip(parameters, total, strict=True))
    )


def _unquantized(t: Tensor) -> Tensor:
    return getattr(t, "unquantized", t)


def symmetric_step(t: Tensor, bits: int, *, per_channel: bool = False) -> Tensor:
    largest = t.abs().amax(tuple(range(1, t.dim())), keepdim=True) if per_channel else t.abs().max()
    return largest / max(2 ** (bits - 1) - 1, 1)


def affine_step(t: Tensor, bits: int) -> Tensor:
    return (t.max().clamp(min=0) - t.min().clamp(max=0)) / (2**bits - 1)


class Sites:
    """Passes what layers are given through a function, once for each tensor: its identity and version count.

    Args:
        function: of the name of the first layer that is given a tensor, and the tensor.
    """

    def __init__(self, function: Callable[[str, Tensor], Tensor]) -> None:
        self.function = function
        self.seen: list[tuple[Tensor, int, Tensor]] = []

    def see(self, name: str, t: Tensor) -> Tensor:
        for given, version, result in self.seen:
            if given is t and version == t._version:
                return result
        result = self.function(name, t)
        self.seen.append((t, t._version, result))  # keeps the tensor, whose identity nobody else gets
        return result

    def watch(self, module: nn.Module, layers: Iterable[str]) -> list[RemovableHandle]:
        return [
            module.get_submodule(name).register_forward_pre_hook(
                lambda _, i, name=name: (self.see(name, i[0]), *i[1:])
            )
            for name in layers
        ]


def measure(
    module: nn.Module,
    loss_fn: Callable[[nn.Module], Tensor],
    *,
    weights: Iterable[str] = (),
    inputs_of: Iterable[str] = (),
    data: object = None,
) -> Measured:
    """Run ``loss_fn(module)`` and keep the named tensors.

    Args:
        module: a plain network.
        loss_fn: takes the module, returns the loss.
        weights: names such as ``"features.0.weight"``; of a parametrized one, the tensor in use.
        inputs_of: layers whose first input is a penalised activation: the gradient is what comes back from
            the layers that are given the very tensor, and from nothing else that reads it.
        data: the network's input, which is no activation, in whatever shape a layer is given it.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str, t: Tensor) -> Tensor:
        if t is data or (t._base is not None and t._base is data and t.numel() == data.numel()):
            return t
        own = tap(t) if t.requires_grad else t.detach().requires_grad_()  # behind frozen layers alone
        kept[f"{name} #{len(kept)}" if name in kept else name] = own
        own.unquantized = _unquantized(t)
        return own

    handles = Sites(keep).watch(module, inputs_of)
    try:
        with parametrize.cached():
            loss = loss_fn(module)
            return Measured(loss, {name: attrgetter(name)(module) for name in weights}, kept)
    finally:
        for handle in handles:
            handle.remove()


def quantize(
    module: nn.Module,
    run: Callable[[nn.Module], object],
    *,
    weights: Iterable[str],
    inputs_of: Iterable[str],
    weight_bits: int,
    activation_bits: int,
    input_bits: int,
) -> None:
    """Fake-quantize a plain network in place: weights, and what the named layers are given.

    Args:
        module: a plain network.
        run: passes data through it, in evaluation mode, to find the ranges of activations.
        weights: names of weights; each gets a symmetric grid for its own range.
        inputs_of: layers whose first input is quantized, on an affine grid.
        weight_bits: width of the weights.
        activation_bits: width of the activations.
        input_bits: width of the network's input, which is what the first of the layers is given.
    """
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str, t: Tensor) -> Tensor:
        low, high = ranges.get(name, (t.min(), t.max()))
        ranges[name] = (torch.minimum(low, t.min()), torch.maximum(high, t.max()))
        return t

    layers = list(inputs_of)
    handles = Sites(observe).watch(module, layers)
    training = module.training
    with torch.no_grad():
        run(module.eval())
    module.train(training)
    for handle in handles:
        handle.remove()
    grids = {
        name: affine_grid(*ends, input_bits if name == layers[0] else activation_bits)
        for name, ends in ranges.items()
    }

    def quantized(name: str, t: Tensor) -> Tensor:
        result = fake_quantize(t, *grids[name])
        result.unquantized = t
        return result

    Sites(quantized).watch(module, layers)
    for name in weights:
        owner, _, attribute = name.rpartition(".")
        layer = module.get_submodule(owner)
        limit = 2 ** (weight_bits - 1) - 1
        scale = symmetric_step(getattr(layer, attribute).detach(), weight_bits)
        grid = FakeQuantize(scale, torch.zeros_like(scale), -limit, limit)
        parametrize.register_parametrization(layer, attribute, grid)


def affine_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, int, int]:
    scale = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
    return scale, torch.round(-low.clamp(max=0) / scale), 0, 2**bits - 1
