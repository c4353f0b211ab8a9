"""Operations of a region that quantize and measure: sites, and batch norms fused with a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.backends import contract, resolve
from gradl1_fast.conversion.regions.operations import Operation
from gradl1_fast.conversion.regions.passes import Backward, DoubleBackward, Forward, NotFittingError
from gradl1_fast.nn.quantizers import ActivationQuantizer

__all__ = ["BatchNorm", "Measurement", "Site"]


class Measurement:
    """How a site quantizes and measures the tensor in a slot.

    Args:
        quantizer: the quantizer of the site.
        slot: the slot of the tensor.
        number: the index of the site among the measured sites; None if no penalty counts the tensor.
        by_step: whether the norm is multiplied by the quantization step.
    """

    def __init__(self, quantizer: ActivationQuantizer, slot: int, number: int | None, by_step: bool) -> None:
        self.quantizer, self.slot, self.number, self.by_step = quantizer, slot, number, by_step

    @property
    def codes(self) -> tuple[int, int] | None:
        """The smallest and the largest code at the current bit width; None in float."""
        return None if self.quantizer.bits is None else (0, 2**self.quantizer.bits - 1)

    def grid(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return scale and zero point at the current bit width; None in float."""
        if self.quantizer.bits is None:
            return None, None
        return self.quantizer.grid(sum_dtype(dtype), self.quantizer.bits)[:2]


class Site(Operation):
    """A site as a separate operation, for a tensor that is also read by other operations."""

    def __init__(self, x: int, measurement: Measurement) -> None:
        self.x, self.measurement = x, measurement
        self._tap: contract.Tap | None = None
        self._quantize: contract.FakeQuantize | None = None

    @override
    def reads(self) -> Sequence[int]:
        return (self.x,)

    @override
    def forward(self, run: Forward) -> None:
        x, measurement = run.values[self.x], self.measurement
        if self._tap is None:
            self._prepare(x)
        if measurement.by_step and measurement.slot not in run.ends:
            run.ends[measurement.slot] = self._tap.ends(x)  # type: ignore[union-attr]
        y, scale, zero_point = x, None, None
        if self._quantize is not None:
            scale, zero_point = measurement.grid(x.dtype)
            y = self._quantize.forward(x, scale, zero_point)  # type: ignore[arg-type]
        run.values[self.out] = y
        if run.saved is not None and (self._quantize is not None or self.ends_slot is not None):
            run.saved[self.index] = x, scale, zero_point

    @override
    def keeps(self) -> Sequence[int]:
        return (self.x,) if self.measurement.codes is not None or self.ends_slot is not None else ()

    @override
    def value(self, run: Backward) -> Tensor:
        return run.saved[self.index][0]

    def _prepare(self, x: Tensor) -> None:
        self._tap = contract.prepare_tap(resolve("tap", x), x)
        if self.measurement.codes is not None:
            backend = resolve("fake_quantize", x)
            self._quantize = contract.prepare_fake_quantize(backend, x, self.measurement.codes)

    @override
    def backward(self, run: Backward, dy: Tensor) -> None:
        number = None if run.record is None else self.measurement.number
        if run.record is not None:
            run.record[self.index] = dy
        if self._quantize is None:
            if number is not None:
                run.l1[number] = self._tap.backward(dy)  # type: ignore[union-attr]
            run.add(self.x, dy, owned=False)
        else:
            x, scale, zero_point = run.saved[self.index]
            dx, l1 = self._quantize.backward(dy, x, scale, zero_point, number is not None)
            if number is not None:
                run.l1[number] = l1  # type: ignore[assignment]
            run.add(self.x, dx)
        if self.ends_slot in run.d_ends:
            self._add_ends_gradient(run)

    def _add_ends_gradient(self, run: Backward) -> None:
        slot = self.measurement.slot
        dx, x = run.grads[slot], run.saved[self.index][0]
        run.grads[slot] = self._tap.add_ends_gradient(dx, x, run.ends[slot], run.d_ends[slot])  # type: ignore[union-attr]
        run.owned[slot] = True

    @override
    def double_backward(self, run: DoubleBackward, dy: Tensor) -> None:
        tangent = run.tangents[self.x]
        d_l1 = None if self.measurement.number is None else run.d_l1.get(self.measurement.number)
        if tangent is None and d_l1 is None:
            return
        if self._quantize is not None:
            saved = run.saved[self.index]
            run.tangents[self.out] = self._quantize.double_backward(tangent, d_l1, dy, *saved)
        elif d_l1 is None:
            run.tangents[self.out] = tangent
        else:
            run.tangents[self.out] = self._tap.double_backward(tangent, d_l1, dy)  # type: ignore[union-attr]


class BatchNorm(Operation):
    """``q(act(norm(x) + residual))``, quantized and measured if only the layers of one site read it.

    Args:
        norm: the module; the program updates its running statistics in training.
        x: the slot of the input.
        residual: the slot of the residual, or None.
        weight: the index of the weight among the region's parameters, or None.
        bias: the index of the bias, or None.
        needs: whether the weight and the bias need gradients.
        activation: ``"none"``, ``"relu"`` or ``"relu6"``.
    """

    def __init__(
        self,
        norm: nn.BatchNorm2d,
        x: int,
        residual: int | None,
        weight: int | None,
        bias: int | None,
        needs: tuple[bool, bool],
        activation: str,
    ) -> None:
        self.norm, self.x, self.residual, self.activation = norm, x, residual, activation
        self.weight, self.bias = weight, bias
        self.needs_weight, self.needs_bias = needs
        self.measurement: Measurement | None = None
        self.training = norm.training or norm.running_mean is None
        self._raw: contract.BatchNormAct | None = None

    @override
    def reads(self) -> Sequence[int]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @override
    def forward(self, run: Forward) -> None:
        x, residual = run.values[self.x], None if self.residual is None else run.values[self.residual]
        if self._raw is None:
            self._prepare(x, residual)
        weight, bias, mean, variance = self._vectors(run.args)
        scale, zero_point = (None, None) if self.measurement is None else self.measurement.grid(x.dtype)
        y, activated, mean, rstd, ends = self._raw.forward(  # type: ignore[union-attr]
            x, weight, bias, mean, variance, residual, scale, zero_point
        )
        run.values[self.out] = y
        if ends is not None:
            run.ends[self.out] = ends
        if self.norm.training and self.norm.running_mean is not None:
            run.statistics.append((self.norm, mean, rstd, x.numel() // x.shape[1]))
        if run.saved is not None:
            if scale is None:
                activated = y if self.activation != "none" or self.ends_slot is not None else None
            run.saved[self.index] = x, activated, mean, rstd, scale, zero_point

    @override
    def keeps(self) -> Sequence[int]:
        gives_mask = self.activation != "none" or self.ends_slot is not None
        return (self.x, self.out) if gives_mask else (self.x,)

    @override
    def value(self, run: Backward) -> Tensor:
        return run.saved[self.index][1]

    def _vectors(self, args: list[Tensor]) -> tuple[Any, ...]:
        affine = [None if i is None else args[i] for i in (self.weight, self.bias)]
        norm = self.norm
        return (*affine, None, None) if self.training else (*affine, norm.running_mean, norm.running_var)

    def _prepare(self, x: Tensor, residual: Tensor | None) -> None:
        self.norm._check_input_dim(x)
        if self.training:
            nn.functional._verify_batch_size(x.size())  # type: ignore[attr-defined]
        if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
            raise NotFittingError("a residual differs from the normalised tensor in shape or type")
        self._raw = contract.prepare_batch_norm_act(
            resolve("batch_norm_act", x),
            x,
            training=self.training,
            eps=self.norm.eps,
            activation=self.activation,
            with_residual=residual is not None,
            codes=None if self.measurement is None else self.measurement.codes,
            with_ends=self.ends_slot is not None,
        )

    @override
    def backward(self, run: Backward, dy: Tensor) -> None:
        x, activated, mean, rstd, scale, zero_point = run.saved[self.index]
        number = None if run.record is None or self.measurement is None else self.measurement.number
        if run.record is not None:
            run.record[self.index] = dy
        dx, dweight, dbias, dresidual, l1 = self._raw.backward(  # type: ignore[union-attr]
            dy, x, activated, *self._affine(run.args), mean, rstd, scale, zero_point, number is not None,
            run.ends.get(self.out), run.d_ends.get(self.out),
        )  # fmt: skip
        if number is not None:
            run.l1[number] = l1  # type: ignore[assignment]
        run.add(self.x, dx)
        if self.residual is not None:
            run.add(self.residual, dy if dresidual is None else dresidual, owned=dresidual is not None)
        if run.of_others:
            if self.needs_weight:
                run.give(self.weight, dweight)  # type: ignore[arg-type]
            if self.needs_bias:
                run.give(self.bias, dbias)  # type: ignore[arg-type]

    def _affine(self, args: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        weight = None if self.weight is None else args[self.weight]
        return weight, None if self.bias is None else args[self.bias]

    @override
    def double_backward(self, run: DoubleBackward, dy: Tensor) -> None:
        x, activated, mean, rstd, scale, zero_point = run.saved[self.index]
        of_residual = None if self.residual is None else run.tangents[self.residual]
        d_weight, d_bias = (None if i is None else run.d_args[i] for i in (self.weight, self.bias))
        number = None if self.measurement is None else self.measurement.number
        d_l1 = None if number is None else run.d_l1.get(number)
        cotangents = run.tangents[self.x], d_weight, d_bias, of_residual, d_l1
        if all(value is None for value in cotangents):
            return
        run.tangents[self.out], d_x, d_w = self._raw.double_backward(  # type: ignore[union-attr]
            *cotangents, dy, x, activated, *self._affine(run.args), mean, rstd, scale, zero_point
        )
        run.add(self.x, d_x)
        if self.needs_weight:
            run.give(self.weight, d_w)  # type: ignore[arg-type]
