"""The operations as data: the computation, its reference, and the shapes of its cotangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradl1_fast import functional as ours
from tests import oracle


@dataclass(frozen=True)
class Case:
    """One operation with its options. ``function`` also takes ``probe=`` if the operation has one."""

    id: str
    function: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    probe: bool = False
    straight_through: bool = False
    gain: float = 1.0  # of the second input

    @property
    def op(self) -> str:
        return self.id.partition(" ")[0]

    def call(self, inputs: Sequence[Tensor], probe: Tensor | None) -> Tensor:
        return self.function(*inputs) if probe is None else self.function(*inputs, probe=probe)

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        values = [random(shape, seed) for seed, shape in enumerate(self.shapes)]
        return [(self.gain * v if i == 1 else v).to(dtype) for i, v in enumerate(values)]


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return normal values that every floating type represents."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16).half().double()


def _beside(x: Tensor, operation: Callable[..., Tensor], t: Tensor) -> Tensor:
    """Return ``t`` in the type of ``x``, which the truth needs, or at least float32, as a module keeps it."""
    mixed = operation.__module__ == ours.__name__
    return t.bfloat16().to(torch.promote_types(x.dtype, torch.float32) if mixed else x.dtype)


def _conv(name: str, x: tuple[int, ...], w: tuple[int, ...], bias: bool = True, **geometry: Any) -> Case:
    shapes = (x, w, (w[0],)) if bias else (x, w)
    return Case(f"conv {name}", partial(ours.conv, **geometry), partial(oracle.conv, **geometry), shapes)


CONV = [
    _conv("1d", (2, 3, 7), (4, 3, 3), stride=2, padding=1),
    _conv("2d", (2, 3, 6, 5), (4, 3, 3, 3)),
    _conv("2d without bias", (2, 3, 6, 5), (4, 3, 3, 3), bias=False, padding=(1, 0)),
    _conv("3d", (1, 2, 4, 5, 3), (2, 2, 2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0)),
    _conv("pointwise", (2, 5, 4, 4), (3, 5, 1, 1), bias=False),
    _conv("strided pointwise", (2, 3, 5, 5), (4, 3, 1, 1), bias=False, stride=2),
    _conv("same", (2, 3, 6, 5), (4, 3, 3, 3), padding="same"),
    _conv("same, odd total", (2, 2, 5, 6), (3, 2, 2, 4), padding="same"),
    _conv("same, odd total, dilated", (1, 2, 9, 8), (2, 2, 4, 3), padding="same", dilation=(1, 2)),
    _conv("1d, same, odd total", (2, 2, 6), (3, 2, 4), padding="same"),
    _conv("valid", (2, 3, 6, 5), (4, 3, 3, 2), padding="valid", stride=2),
    _conv("dilation", (2, 2, 8, 7), (3, 2, 3, 2), dilation=(2, 3), padding=1),
    _conv("groups", (2, 4, 5, 5), (6, 2, 3, 3), groups=2, padding=1),
    _conv("depthwise", (2, 4, 5, 6), (4, 1, 3, 3), groups=4, padding=1, bias=False),
    _conv("depthwise, multiplied", (2, 3, 6, 5), (6, 1, 3, 3), groups=3, stride=2),
    _conv("unbatched", (3, 6, 5), (4, 3, 3, 3), padding=1),
    _conv("unbatched 1d, same, odd total", (2, 6), (3, 2, 2), padding="same"),
]


def _conv_transpose(
    name: str, x: tuple[int, ...], w: tuple[int, ...], bias: bool = True, **geometry: Any
) -> Case:
    shapes = (x, w, (w[1] * geometry.get("groups", 1),)) if bias else (x, w)
    function, truth = (partial(f, **geometry) for f in (ours.conv_transpose, oracle.conv_transpose))
    return Case(f"conv_transpose {name}", function, truth, shapes)


CONV_TRANSPOSE = [
    _conv_transpose("1d", (2, 3, 5), (3, 4, 3), stride=2, padding=1, output_padding=1),
    _conv_transpose("2d", (2, 3, 4, 5), (3, 4, 3, 2)),
    _conv_transpose("2d without bias", (2, 3, 4, 5), (3, 4, 3, 3), bias=False, padding=(1, 0)),
    _conv_transpose("3d", (1, 2, 3, 2, 3), (2, 3, 2, 3, 1), stride=(1, 2, 1), output_padding=(0, 1, 0)),
    _conv_transpose("pointwise", (2, 5, 4, 4), (5, 3, 1, 1), bias=False),
    _conv_transpose("doubling", (2, 4, 3, 4), (4, 2, 2, 2), stride=2),
    _conv_transpose("dilation", (2, 2, 4, 5), (2, 3, 3, 2), dilation=(2, 3), output_padding=(1, 2)),
    _conv_transpose("groups", (2, 4, 3, 4), (4, 3, 3, 3), groups=2, stride=2, padding=1),
    _conv_transpose("depthwise", (2, 4, 3, 4), (4, 1, 3, 3), bias=False, groups=4, stride=(2, 1)),
    _conv_transpose("unbatched", (3, 4, 5), (3, 2, 3, 3), stride=2, padding=1, output_padding=1),
    _conv_transpose("unbatched 1d", (2, 5), (2, 3, 3), stride=2),
]

LINEAR = [
    Case("linear 2d", ours.linear, oracle.linear, ((4, 5), (3, 5), (3,))),
    Case("linear sequence", ours.linear, oracle.linear, ((2, 4, 5), (3, 5), (3,))),
    Case("linear sequence without bias", ours.linear, oracle.linear, ((2, 4, 5), (3, 5))),
    Case("linear one row", ours.linear, oracle.linear, ((5,), (3, 5), (3,))),
]


def _batch_norm(
    name: str,
    x: tuple[int, ...],
    residual: tuple[int, ...] | None = None,
    affine: bool = True,
    grid: tuple[float, float, int, int] | None = None,
    **options: Any,
) -> Case:
    channels = (x[1],)
    shapes = (x, *[channels] * (2 if affine else 0), *([] if residual is None else [residual]))

    def call(operation: Callable[..., Tensor], *inputs: Tensor, **probe: Any) -> Tensor:
        x, *rest = inputs
        last = None if residual is None else rest.pop()
        statistics = [random(channels, 7), 0.5 + random(channels, 8).abs()]
        statistics = [_beside(x, operation, s) for s in statistics]
        if grid is not None:
            ends = (_beside(x, operation, torch.tensor(t)) for t in grid[:2])
            probe["grid"] = (*ends, *grid[2:])
        return operation(x, *statistics, *rest, residual=last, **options, **probe)

    function, truth = partial(call, ours.batch_norm_act), partial(call, oracle.batch_norm_act)
    gain = 8.0 if options.get("activation") == "relu6" else 1.0  # so that both of its ends are reached
    return Case(
        f"batch_norm_act {name}", function, truth, shapes, True, straight_through=grid is not None, gain=gain
    )


BATCH_NORM_ACT = [
    _batch_norm("training", (3, 4, 3, 2), training=True),
    _batch_norm("training relu", (3, 4, 3, 2), training=True, activation="relu"),
    _batch_norm(
        "training relu6 residual", (3, 4, 3, 2), (3, 4, 3, 2), training=True, activation="relu6", eps=0.1
    ),
    _batch_norm(
        "training relu residual broadcast", (3, 4, 3, 2), (4, 1, 2), training=True, activation="relu"
    ),
    _batch_norm("training residual broadcast", (3, 4, 3, 2), (1, 4, 1, 1), training=True),
    _batch_norm("training not affine", (4, 3, 5), affine=False, training=True, activation="relu"),
    _batch_norm("training one channel", (5, 1, 3), training=True, activation="relu"),
    _batch_norm("training 2d", (6, 3), training=True, activation="relu6"),
    _batch_norm("training 5d", (2, 2, 2, 3, 2), training=True, activation="relu"),
    _batch_norm("evaluation", (3, 4, 3, 2)),
    _batch_norm("evaluation relu residual", (3, 4, 3, 2), (3, 4, 3, 2), activation="relu"),
    _batch_norm("evaluation relu6", (3, 4, 3, 2), activation="relu6"),
    _batch_norm("evaluation not affine", (3, 4, 3, 2), affine=False),
    _batch_norm("training quantized", (3, 4, 3, 2), training=True, grid=(0.375, 3.0, 0, 7)),
    _batch_norm(
        "training relu quantized", (3, 4, 3, 2), training=True, activation="relu", grid=(0.25, 1.0, 0, 3)
    ),
    _batch_norm(
        "training relu6 residual quantized",
        (3, 4, 3, 2),
        (4, 1, 2),
        training=True,
        activation="relu6",
        eps=0.1,
        grid=(0.5, 0.0, 0, 15),  # beyond 6, where the activation alone stops the gradient
    ),
    _batch_norm("training residual quantized", (4, 3, 5), (4, 3, 5), training=True, grid=(0.5, 4.0, 1, 6)),
    _batch_norm(
        "training not affine quantized",
        (6, 3),
        affine=False,
        training=True,
        activation="relu",
        grid=(0.25, 0.0, 0, 3),
    ),
    _batch_norm(
        "evaluation relu residual quantized",
        (3, 4, 3, 2),
        (3, 4, 3, 2),
        activation="relu",
        grid=(0.25, 1.0, 0, 7),
    ),
    _batch_norm("evaluation quantized", (3, 4, 3, 2), grid=(0.5, 3.0, 0, 6)),
    _batch_norm("evaluation not affine quantized", (3, 4, 3, 2), affine=False, grid=(0.5, 3.0, 0, 6)),
]


def _fake_quantize(
    name: str, x: tuple[int, ...], codes: tuple[int, int], axis: int | None = None, zero: float = 0
) -> Case:
    channels = 1 if axis is None else x[axis]
    scale = 0.25 + 0.125 * torch.arange(channels, dtype=torch.float64)
    zero_point = torch.full((channels,), zero, dtype=torch.float64) + torch.arange(channels) % 2
    shape = () if axis is None else (channels,)

    def call(operation: Callable[..., Tensor], x: Tensor, **probe: Any) -> Tensor:
        grid = (_beside(x, operation, t.reshape(shape)) for t in (scale, zero_point))
        return operation(x, *grid, *codes, axis=axis, **probe)

    function, truth = partial(call, ours.fake_quantize), partial(call, oracle.fake_quantize)
    return Case(f"fake_quantize {name}", function, truth, (x,), probe=True, straight_through=True)


FAKE_QUANTIZE = [
    _fake_quantize("symmetric", (3, 4, 2, 3), (-3, 3)),
    _fake_quantize("affine", (3, 4, 2, 3), (0, 7), zero=3),
    _fake_quantize("per channel", (3, 4, 2, 3), (0, 7), axis=1, zero=3),
    _fake_quantize("per channel of a weight", (4, 3, 2, 2), (-3, 3), axis=0),
    _fake_quantize("per last channel", (3, 5), (-2, 1), axis=-1),
    _fake_quantize("16 bits", (3, 4), (-32767, 32767)),
    _fake_quantize("scalar", (), (-7, 7)),
]

TAP = [Case(f"tap {len(s)}d", ours.tap, oracle.tap, (s,), probe=True) for s in ((3, 4, 2, 3), (2, 3, 4), ())]

L1_NORM = [
    Case("l1_norm of one", lambda *t: ours.l1_norm(t), lambda *t: oracle.l1_norm(t), ((3, 4),)),
    Case(
        "l1_norm of many",
        lambda *t: ours.l1_norm(t),
        lambda *t: oracle.l1_norm(t),
        ((3, 4, 2, 3), (5,), (), (2, 7)),
    ),
]

CASES = TAP + FAKE_QUANTIZE + L1_NORM + CONV + CONV_TRANSPOSE + LINEAR + BATCH_NORM_ACT
