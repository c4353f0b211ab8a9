"""Double backprop through the original model, by hooks alone. It imports nothing of gradl1_fast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tests.zoo.entries import Batch, run
from tests.zoo.subjects import loss_of, seed

PRODUCTS = {
    *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, F.linear),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
}


@dataclass
class Penalised:
    """Loss, penalty, its terms ``sum |dL/dT|`` by name, and gradients of loss + penalty by parameter."""

    loss: float
    penalty: float
    terms: dict[str, float]
    gradients: dict[str, Tensor]


@dataclass
class Sites:
    """What layers were given, each tensor behind one tap whatever the number of layers it feeds.

    Attributes:
        inputs: of the model, which are data.
        taps: name of the first layer, the tensor, which is kept lest another gets its identity, and the tap.
        weights: tensors that layers have computed to be their weight, by layer.
        calling: layers whose forward pass runs, innermost last.
    """

    inputs: list[Tensor]
    taps: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = field(default_factory=dict)
    weights: list[tuple[str, Tensor]] = field(default_factory=list)
    calling: list[str] = field(default_factory=list)

    def tap(self, name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point() or any(_is_same_data(t, x) for x in self.inputs):
            return t
        key = (id(t), t._version)
        if key not in self.taps:
            tap = t * 1
            if torch.is_grad_enabled() and not tap.requires_grad:  # of constants, or behind frozen layers
                tap.requires_grad_()
            self.taps[key] = (name, t, tap)
        return self.taps[key][2]

    def note(self, layer: str, weight: Tensor) -> Tensor:
        self.weights.append((layer, weight))
        return weight


def _is_same_data(t: Tensor, x: Tensor) -> bool:
    """Return whether a tensor holds the numbers of another, in whatever shape and order."""
    if t.numel() != x.numel() or not x.is_floating_point():
        return False
    return torch.equal(t.detach().flatten().sort().values, x.flatten().sort().values)


class Weights(TorchFunctionMode):
    """Hands a function the weights that layers compute: standardised, normalised, or put together."""

    def __init__(self, sites: Sites, see: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.sites, self.see = sites, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS and self.sites.calling:
            named = len(args) < 2
            weight = kwargs["weight"] if named else args[1]
            if not isinstance(weight, nn.Parameter):
                weight = self.see(self.sites.calling[-1], weight)
                if named:
                    kwargs = kwargs | {"weight": weight}
                else:
                    args = (args[0], weight, *args[2:])
        return func(*args, **kwargs)


def penalised(
    model: nn.Module,
    batch: Batch,
    *,
    weights: Iterable[str],
    inputs: Iterable[str],
    lambda_w: float,
    lambda_a: float,
) -> Penalised:
    """Differentiate ``loss + lambda_w * sum |dL/dW| + lambda_a * sum |dL/dY|``.

    Args:
        model: the original, in the mode that is asked for.
        batch: its inputs.
        weights: layers whose weight is measured, as it is used; a parameter of several layers counts once.
        inputs: layers whose input is measured.
        lambda_w: factor of the weights' terms.
        lambda_a: factor of the inputs' terms.
    """
    sites = Sites(list(batch.values()) if isinstance(batch, dict) else [batch])
    weights, inputs = list(weights), set(inputs)
    seed()
    with differentiable_twice(), tapped(model, weights, inputs, sites):
        loss = loss_of(run(model, batch))
        measured = [(f"{n}.weight", t, lambda_w) for n, t in _weights(model, weights, sites)]
        measured += [(f"{n}.input", t, lambda_a) for n, _, t in sites.taps.values() if t.requires_grad]
        gradients = torch.autograd.grad(
            loss, [t for _, t, _ in measured], create_graph=True, allow_unused=True
        )
        penalty, terms = _penalty(loss, measured, gradients)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        total = torch.autograd.grad(
            loss + penalty, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
    return Penalised(float(loss), float(penalty), terms, dict(zip(parameters, total, strict=True)))


def _weights(model: nn.Module, names: Sequence[str], sites: Sites) -> list[tuple[str, Tensor]]:
    computed = {name for name, _ in sites.weights}
    found = [(name, model.get_submodule(name).weight) for name in names if name not in computed]
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, weight in [*found, *sites.weights]:
        if weight.requires_grad:
            distinct.setdefault(id(weight), (name, weight))
    return list(distinct.values())


def _penalty(
    loss: Tensor, measured: Sequence[tuple[str, Tensor, float]], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, dict[str, float]]:
    penalty = torch.zeros_like(loss)
    terms: dict[str, float] = {}
    for (name, _, factor), gradient in zip(measured, gradients, strict=True):
        norm = torch.zeros_like(loss) if gradient is None else gradient.abs().sum()
        penalty = penalty + factor * norm
        terms[name] = terms.get(name, 0.0) + float(norm)
    return penalty, terms


@contextlib.contextmanager
def tapped(
    model: nn.Module,
    layers: Iterable[str],
    inputs: set[str],
    sites: Sites,
    see: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Put a tap before each layer; what else reads the tensor reads the tensor itself.

    Weights that layers compute are noted, or replaced by what ``see`` makes of them.
    """
    handles = []

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sites.calling.append(name)
        if name not in inputs:
            return args, kwargs
        if args:
            return (sites.tap(name, args[0]), *args[1:]), kwargs
        key = next(iter(kwargs))
        return args, kwargs | {key: sites.tap(name, kwargs[key])}

    for name in layers:
        layer = model.get_submodule(name)
        handles += [
            layer.register_forward_pre_hook(lambda _, a, k, name=name: enter(name, a, k), with_kwargs=True),
            layer.register_forward_hook(lambda *_: sites.calling.pop() and None),
        ]
    try:
        with Weights(sites, see or sites.note):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Compute attention and hard sigmoids in forms that have a second derivative."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(F, "hardsigmoid", lambda x, inplace=False: hard_sigmoid(x)),
        mock.patch.object(F, "hardswish", lambda x, inplace=False: x * F.relu6(x + 3) / 6),
    ):
        yield


def hard_sigmoid(x: Tensor) -> Tensor:
    """Return the hard sigmoid, with the gradient of PyTorch: its factor 1/6 is rounded to float32."""
    exact = F.relu6(x + 3) / 6
    rounded = exact * 6 * float(torch.tensor(1 / 6, dtype=torch.float32))
    return rounded + (exact - rounded).detach()


@contextlib.contextmanager
def weights_replaced(
    model: nn.Module, batch: Batch, layers: Sequence[str], replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Let the layers use ``replace(weight)``: parameters of their own for good, weights they compute here."""
    sites = Sites([])
    with torch.no_grad(), tapped(model, layers, set(), sites):
        run(model, batch)
    computed = {name for name, _ in sites.weights}
    for name in layers:
        layer = model.get_submodule(name)
        if name not in computed and "weight" in layer._parameters:
            layer.weight = nn.Parameter(replace(layer.weight.detach()))
    with tapped(model, layers, set(), sites, lambda _, weight: replace(weight)):
        yield
