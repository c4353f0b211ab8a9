"""The launches of batch_norm_act's kernels for one shape."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import triton
from torch import Tensor

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends.triton import _batch_norm_act_kernels as kernels
from gradl1_fast.backends.triton import _launch
from gradl1_fast.backends.triton._ends import ends_finisher
from gradl1_fast.backends.triton._launch import Kind, Launch
from gradl1_fast.backends.triton._tiles import plan

__all__ = ["Launches"]


class Launches:
    """The launches of every pass, each created on first use."""

    def __init__(self, x: Tensor, training: bool, eps: float, activation: str) -> None:
        self.cut, self._training, self._eps, self._activation = plan(x), training, eps, activation
        self._dtype = sum_dtype(x.dtype)
        self._finishes: dict[int, Launch] = {}  # by the number of sums, which a kind does not tell

    def _on_tiles(self, kernel: Any, **arguments: Any) -> Launch:
        return Launch(kernel, self.cut.grid[0], **self.cut.arguments, **arguments)

    @cached_property
    def statistics(self) -> Launch:
        """Launch for the partials of mean and variance."""
        return self._on_tiles(kernels._batch_norm_act_statistics_kernel)

    @cached_property
    def statistics_finish(self) -> Launch:
        """Launch for mean and 1/std from the partials."""
        cut, width = self.cut, min(triton.next_power_of_2(self.cut.channels), 32)
        between = 1 if cut.arguments["LAST"] else cut.arguments["width"]
        sizes = {"between": between, "splits": cut.splits, "channels": cut.channels}
        constants = {"EPS": self._eps, "ROWS": 256 // width, "COLS": width, **_launch.OPTIONS}
        kernel = kernels._batch_norm_act_statistics_finish_kernel
        return Launch(kernel, triton.cdiv(cut.channels, width), **sizes, **constants)

    @cached_property
    def forward(self) -> Launch:
        """Launch for y."""
        return self._on_tiles(kernels._batch_norm_act_forward_kernel, ACTIVATION=self._activation)

    @cached_property
    def ends_finish(self) -> Launch:
        """Launch for the ends of y from those of the programs."""
        return ends_finisher(self.cut.grid[0])

    @cached_property
    def backward_sums(self) -> tuple[Launch, Launch]:
        """Launches without and with the norm of dy."""
        kernel, activation = kernels._batch_norm_act_backward_sums_kernel, self._activation
        one, other = (self._on_tiles(kernel, ACTIVATION=activation, WITH_L1=w) for w in (False, True))
        return one, other

    @cached_property
    def backward(self) -> tuple[Launch, Launch]:
        """Launches for a gradient that is already masked, and for one that is not."""
        kernel, sizes = kernels._batch_norm_act_backward_kernel, {"count": self.cut.size_of_channel}
        options = [{"ACTIVATION": a, "TRAINING": self._training, **sizes} for a in ("none", self._activation)]
        one, other = (self._on_tiles(kernel, **option) for option in options)
        return one, other

    @cached_property
    def double_backward_sums(self) -> Launch:
        """Launch for the partials of five sums."""
        kernel = kernels._batch_norm_act_double_backward_sums_kernel
        return self._on_tiles(kernel, ACTIVATION=self._activation)

    @cached_property
    def double_backward_finish(self) -> Launch:
        """Launch for the five sums of each channel from the partials, into one tensor."""
        return _launch.finisher(self._dtype, self.cut.splits, self.cut.channels, stacked=5)

    @cached_property
    def double_backward(self) -> Launch:
        """Launch for the cotangents."""
        options = {"ACTIVATION": self._activation, "TRAINING": self._training}
        kernel = kernels._batch_norm_act_double_backward_kernel
        return self._on_tiles(kernel, count=self.cut.size_of_channel, **options)

    def finish(self, kind: Kind, values: Tensor, outs: tuple[Tensor, ...]) -> None:
        """Sum the partials of each channel, each k into ``outs[k]``."""
        launch = self._finishes.get(len(outs))
        if launch is None:
            launch = _launch.finisher(self._dtype, self.cut.splits, self.cut.channels)
            self._finishes[len(outs)] = launch
        launch(kind, values, outs)

    @cached_property
    def total(self) -> Launch:
        """Launch for the sum over the channels."""
        return _launch.finisher(self._dtype, self.cut.channels, 1)
