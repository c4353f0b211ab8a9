"""The cases of ``bench ops``: each sweep with its arguments, its passes, and plain PyTorch's way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradl1_fast.backends import reference

__all__ = ["Sweep", "bilinear", "elementwise", "random"]

Run = Callable[[], Any]


@dataclass(frozen=True)
class Sweep:
    """One call of a raw operation.

    Attributes:
        operation: its name.
        function: of the backend.
        args: of the function.
        title: of the sweep, with what sets the case apart.
        size: in words.
        passes: whole tensors like ``x`` that must be read or written; 0 where arithmetic counts, not bytes.
        plain: makes plain PyTorch's way to the same result, graph included; it returns None in the place
            of results that it does not compute.
    """

    operation: str
    function: str
    args: tuple[Any, ...]
    title: str
    size: str
    passes: int
    plain: Callable[[], Run] | None = None

    @property
    def x(self) -> Tensor:
        """The first tensor among the arguments."""
        return next(_tensors(self.args))

    @property
    def moved(self) -> list[Tensor]:
        """What a pass goes over: the first tensor, or the first list of tensors, among the arguments."""
        listed = next((a for a in self.args if isinstance(a, list) and a and isinstance(a[0], Tensor)), None)
        return listed or [self.x]

    @property
    def bytes(self) -> int:
        """What the passes move."""
        return self.passes * self.copied_bytes // 2

    @property
    def copied_bytes(self) -> int:
        """What :meth:`copy` moves: two passes."""
        return 2 * sum(t.numel() * t.element_size() for t in self.moved)

    def copy(self) -> Run:
        """Return a copy of as many bytes, in one piece, to measure by."""
        x = torch.cat([t.flatten() for t in self.moved]) if len(self.moved) > 1 else self.x
        out = torch.empty_like(x)
        return lambda: out.copy_(x)

    def truth(self) -> Any:
        """Return the result of the reference in float64."""
        return getattr(reference, self.function)(*_double(self.args))


def elementwise(device: str, dtype: str, layout: str, smoke: bool) -> list[Sweep]:
    """Return every sweep of the operations that move memory, on tensors of one size, and of linear."""
    shape = (2, 8, 16, 16) if smoke else (64, 256, 56, 56) if device == "cuda" else (16, 64, 56, 56)
    x, dy, v = (random(shape, device, dtype, layout) for _ in range(3))
    size = " × ".join(map(str, shape))
    return [
        *_tap(x, dy, v, size),
        *_fake_quantize(x, dy, v, size),
        *_batch_norm(x, dy, v, size),
        *_weights(device, dtype, smoke),
        *_linear(device, dtype, smoke),
    ]


def _tap(x: Tensor, dy: Tensor, v: Tensor, size: str) -> Iterator[Sweep]:
    one = torch.ones((), device=x.device)
    yield Sweep("tap", "tap_backward", (dy,), "backward", size, 1, lambda: lambda: dy.abs().sum())
    args = (v, one, dy)
    yield Sweep("tap", "tap_double_backward", args, "double backward", size, 3, lambda: lambda: v + dy.sign())


def _fake_quantize(x: Tensor, dy: Tensor, v: Tensor, size: str) -> Iterator[Sweep]:
    one = torch.ones((), device=x.device)
    # A power of two, so that division is exact and no type rounds a code to another side.
    step, grid = 0.125, (one * 0.125, one * 0, -7, 7, None)

    def forward() -> Run:
        return lambda: torch.clamp(torch.round(x / step), -7, 7) * step

    def inside() -> Tensor:
        codes = torch.round(x / step)
        return (codes >= -7) & (codes <= 7)

    name = "fake_quantize"
    yield Sweep(name, f"{name}_forward", (x, *grid), "forward", size, 2, forward)

    def backward() -> Any:
        return (torch.where(inside(), dy, 0), dy.abs().sum())

    yield Sweep(name, f"{name}_backward", (dy, x, *grid, True), "backward", size, 3, lambda: backward)

    def double() -> Any:
        return torch.where(inside(), v, 0) + dy.sign()

    args = (v, one, dy, x, *grid)
    yield Sweep(name, f"{name}_double_backward", args, "double backward", size, 4, lambda: double)


def _batch_norm(x: Tensor, dy: Tensor, v: Tensor, size: str) -> Iterator[Sweep]:
    """Yield batch norm with ReLU, without and with a residual."""
    one = torch.ones((), device=x.device)
    c = torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
    for residual in (None, v):
        added = residual is not None
        label = ", residual" if added else ""
        grid = (None, None, 0, 0)
        forward = (x, c, c, None, None, residual, *grid, True, 1e-5, "relu")
        y, _, mean, rstd = reference.batch_norm_act_forward(*forward)
        saved = (dy, x, y, c, c, mean, rstd, *grid, True, "relu")
        plain = partial(_plain_batch_norm, x, c, residual, dy, v)
        make = partial(Sweep, "batch_norm_act", size=size)
        yield make(
            "batch_norm_act_forward",
            forward,
            f"forward{label}",
            passes=4 if added else 3,
            plain=partial(plain, 0),
        )
        yield make(
            "batch_norm_act_backward",
            (*saved, added, True),
            f"backward{label}",
            passes=7 if added else 5,
            plain=partial(plain, 1),
        )
        yield make(
            "batch_norm_act_double_backward",
            (v, c, c, residual, one, *saved, added),
            f"double backward{label}",
            passes=11 if added else 8,
            plain=partial(plain, 2),
        )


def _plain_batch_norm(
    x: Tensor, c: Tensor, residual: Tensor | None, dy: Tensor, v: Tensor, order: int
) -> Run:
    """Return ordinary autograd's sweep of an order, its graph made beforehand."""
    kind = x.dtype
    leaves = [x.detach().clone().requires_grad_(), *(c.clone().requires_grad_() for _ in range(2))]
    if residual is not None:
        leaves.append(residual.detach().clone().requires_grad_())
    g = dy.detach().clone().requires_grad_()

    def forward() -> Tensor:
        z = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True)
        return F.relu(z if residual is None else z + leaves[3])

    if order == 0:
        return lambda: (forward().detach(), None, None, None)
    y = forward()
    absent = [None] * (4 - len(leaves))
    if order == 1:
        return lambda: (
            *torch.autograd.grad(y, leaves, g.detach(), retain_graph=True),
            *absent,
            g.detach().abs().sum(),
        )
    first = torch.autograd.grad(y, leaves, g, create_graph=True)
    outputs = [*first, g.abs().sum(dtype=torch.float32)]
    cotangents = [v, c, c, *([v] if residual is not None else []), torch.ones((), device=x.device)]
    cotangents = [t.to(o.dtype) for t, o in zip(cotangents, outputs, strict=True)]
    assert first[0].dtype == kind
    return lambda: torch.autograd.grad(outputs, [g, leaves[0], leaves[1]], cotangents, retain_graph=True)


def _weights(device: str, dtype: str, smoke: bool) -> Iterator[Sweep]:
    """Yield the l1 norms of the weights of a ResNet-18, or of three small ones."""
    shapes = [(64, 64, 3, 3)] * 4 + [(128, 128, 3, 3)] * 4 + [(256, 256, 3, 3)] * 4 + [(512, 512, 3, 3)] * 4
    shapes = [(4, 4, 3, 3)] * 3 if smoke else shapes
    tensors, vs = ([random(s, device, dtype, "NCHW") for s in shapes] for _ in range(2))
    dy = torch.rand(len(shapes), device=device)
    size = f"{len(shapes)} weights, {sum(map(math.prod, shapes))} values"
    make = partial(Sweep, "l1_norm", size=size)

    def plain() -> Any:
        return torch.stack([t.abs().sum() for t in tensors])

    yield make("l1_norm_forward", (tensors,), "forward", passes=1, plain=lambda: plain)

    def backward() -> Any:
        return [d * t.sign() for d, t in zip(dy, tensors, strict=True)]

    yield make("l1_norm_backward", (dy, tensors), "backward", passes=2, plain=lambda: backward)

    def double() -> Any:
        return torch.stack([(v * t.sign()).sum() for v, t in zip(vs, tensors, strict=True)])

    yield make("l1_norm_double_backward", (vs, tensors), "double backward", passes=2, plain=lambda: double)


def _linear(device: str, dtype: str, smoke: bool) -> Iterator[Sweep]:
    n, inputs, outputs = (4, 6, 5) if smoke else (256, 2048, 1000)
    x, v = (random((n, inputs), device, dtype, "NCHW") for _ in range(2))
    weight, w = (random((outputs, inputs), device, dtype, "NCHW") / inputs**0.5 for _ in range(2))
    dy, every = random((n, outputs), device, dtype, "NCHW"), [True, True, True]
    make = partial(Sweep, "linear", size=f"{n} × {inputs} to {outputs}", passes=0)
    plain = partial(bilinear, F.linear, x, weight, dy, v, w)
    yield make("linear_forward", (x, weight, None), "forward", plain=partial(plain, 0))
    yield make("linear_backward", (dy, x, weight, [True, True]), "backward", plain=partial(plain, 1))
    args = (v, w, dy, x, weight, every)
    yield make("linear_double_backward", args, "double backward", plain=partial(plain, 2))


def bilinear(
    forward: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor, v: Tensor, w: Tensor, order: int
) -> Run:
    """Return ordinary autograd's sweep of an order, its graph made beforehand."""
    x, weight, dy = (t.detach().clone().requires_grad_() for t in (x, weight, dy))
    if order == 0:
        return lambda: forward(x, weight).detach()
    y = forward(x, weight)
    if order == 1:
        return lambda: torch.autograd.grad(y, [x, weight], dy.detach(), retain_graph=True)
    first = torch.autograd.grad(y, [x, weight], dy, create_graph=True)
    return lambda: torch.autograd.grad(first, [dy, x, weight], [v, w], retain_graph=True)


def random(shape: Sequence[int], device: str, dtype: str, layout: str) -> Tensor:
    """Return random values in a type and layout; only images have a layout."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    x = torch.randn(tuple(shape), device=device).to(kind)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" and len(shape) == 4 else x


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(map(_double, value)) if isinstance(value, list | tuple) else value
