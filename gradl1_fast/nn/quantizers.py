"""Quantizer modules: widths, ranges and probes. They hold no parameter and nothing in the state dict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from gradl1_fast import functional as F
from gradl1_fast._checks import MAX_BITS
from gradl1_fast._dtypes import sum_dtype
from gradl1_fast.nn.arming import Arming
from gradl1_fast.nn.codes import along, codes, values
from gradl1_fast.nn.hooks import has_hooks, has_own_forward
from gradl1_fast.nn.rounded import MadeFor
from gradl1_fast.ops.tap import alias

__all__ = ["ActivationQuantizer", "Observer", "WeightQuantizer"]


class Observer(Protocol):
    """What watches the tensors that reach a quantizer, to find its range."""

    def update(self, x: Tensor) -> None:
        """Take note of one batch."""


class _Quantizer(nn.Module):
    """What the quantizers share: a width, and stored ranges that stay in float32 at least."""

    bits: int | None
    _ranges: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # In half precision the ends of a range may overflow; a range goes along to devices alone.
        kept = {name: getattr(self, name) for name in self._ranges if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = getattr(self, name)
            setattr(self, name, value.to(moved.device) if moved.dtype.itemsize < 4 else moved)
        return self


class WeightQuantizer(_Quantizer):
    """Fake-quantizes a weight to ``bits``, with codes around zero.

    Codes are the nearest ones, unless others were stored by :func:`gradl1_fast.round_weights`. Stored codes
    belong to the weight and the range that they were chosen for: with another the quantizer raises.

    The range is the weight's own, from its smallest to its largest value, unless one was stored by
    :func:`gradl1_fast.calibrate_weights`.

    Args:
        per_channel: one range for each output channel rather than one for the tensor.
        out_axis: the axis of the weight that counts output channels: 1 in a transposed convolution.

    Attributes:
        bits: 1 to 16, or None for float. Set it with :func:`gradl1_fast.set_bits`.
        axis: the axis of output channels where each has a range, None for one range for the tensor.
        clip: the stored range goes from ``-clip`` to ``clip`` and weights beyond are clamped. Shape
            ``(widths, channels)``, with one row for all widths or 16, for 1 to 16 bits, and one column
            or one for each channel. None for the weight's own range.
        widest: the largest width that can be chosen.
    """

    clip: Tensor | None
    widest: int = MAX_BITS
    _ranges: ClassVar[tuple[str, ...]] = ("clip",)
    _made_for: dict[int, MadeFor]

    def __init__(self, *, per_channel: bool = False, out_axis: int = 0) -> None:
        super().__init__()
        self.axis = out_axis if per_channel else None
        self.bits = None
        self._made_for = {}
        self.register_buffer("clip", None, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as it is used at the present width.

        Raises:
            RuntimeError: codes are stored for this width, and they were chosen for another weight or range.
        """
        if self.bits is None:
            return weight
        scale, zero_point, q_min, q_max = self.grid(weight.detach(), self.bits)
        quantized = F.fake_quantize(weight, scale, zero_point, q_min, q_max, axis=self.axis)
        if self.clamps:
            _note(quantized, "clamped_at", self.bits)
        if self.bits not in self._made_for:
            return quantized
        chosen = values(self._checked(weight, self.bits), scale, self.axis).to(weight.dtype)
        return chosen + (quantized - quantized.detach())  # the gradient is that of rounding to nearest

    @property
    def rounded(self) -> dict[int, Tensor]:
        """The codes that are stored, by width: whole numbers in the shape of the weight."""
        return {bits: self.get_buffer(_buffer(bits)) for bits in self._made_for}

    def set_rounded(self, bits: int, codes: Tensor | None, made_for: MadeFor | None = None) -> None:
        """Store codes for a width, or remove those that are there.

        Args:
            bits: the width.
            codes: in the shape of the weight, within the grid of the width; None to round to nearest again.
            made_for: the weight and range that they were chosen for.
        """
        self._made_for = {width: other for width, other in self._made_for.items() if width != bits}
        self._buffers.pop(_buffer(bits), None)
        self._non_persistent_buffers_set.discard(_buffer(bits))
        if codes is not None:
            assert made_for is not None
            self._made_for = {**self._made_for, bits: made_for}
            kind = torch.int8 if bits <= 8 else torch.int16
            self.register_buffer(_buffer(bits), codes.detach().to(kind), persistent=False)

    def made_for(self, bits: int) -> MadeFor | None:
        """Return what the codes of a width were chosen for; None if there are none."""
        return self._made_for.get(bits)

    def codes_of(self, weight: Tensor, bits: int) -> Tensor:
        """Return the codes of a weight, whole numbers in float: the stored or the nearest ones.

        Raises:
            RuntimeError: codes are stored for this width, and they were chosen for another weight or range.
        """
        scale, zero_point, *ends = self.grid(weight, bits)
        if bits in self._made_for:
            return self._checked(weight, bits).to(scale.dtype)
        return codes(weight, scale, zero_point, (ends[0], ends[1]), self.axis)

    def _checked(self, weight: Tensor, bits: int) -> Tensor:
        stored = getattr(self, _buffer(bits))
        return self._made_for[bits].checked(stored, weight, self.clip, bits)

    @property
    def clamps(self) -> bool:
        """Whether weights may be beyond the range at the present width, where their gradient stops."""
        return self.bits == 1 or (self.bits is not None and self.clip is not None)

    def grid(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor, int, int]:
        """Return the grid of ``weight`` at ``bits``, for :func:`gradl1_fast.functional.fake_quantize`."""
        if self.clip is None:
            low, high = F.value_range(weight, self.axis)
        else:
            high = _row(self.clip, bits).to(sum_dtype(weight.dtype))
            high = high.reshape(()) if self.axis is None else high.expand(weight.shape[self.axis])
            low = -high
        return F.quantization_grid(low, high, bits, symmetric=True)

    def set_clip(self, clip: Tensor | None) -> None:
        """Store a range from ``-clip`` to ``clip``; see :attr:`clip`. None gives the weight its own again.

        Raises:
            ValueError: the shape is none of those allowed, or a value is negative, NaN or infinite.
        """
        if clip is not None:
            if clip.dim() != 2 or clip.shape[0] not in (1, MAX_BITS):
                raise ValueError(f"clip must have shape (1 or {MAX_BITS}, channels), got {tuple(clip.shape)}")
            if self.axis is None and clip.shape[1] != 1:
                raise ValueError(f"a single range for the tensor needs one column, got {clip.shape[1]}")
            if not bool((clip.isfinite() & (clip >= 0)).all()):
                raise ValueError("clip must be finite and 0 or more")
        self.clip = None if clip is None else clip.detach()

    def step(self, weight: Tensor, bits: int) -> Tensor:
        """Return the step at ``bits`` of the weight's own range, differentiable.

        It has a shape that broadcasts against the weight.
        """
        scale = F.quantization_grid(*F.value_range(weight, self.axis), bits, symmetric=True)[0]
        return along(scale, weight, self.axis)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this quantizer."""
        stored = "own" if self.clip is None else "stored"
        rounded = f", rounded={sorted(self._made_for)}" if self._made_for else ""
        return f"bits={self.bits}, per_channel={self.axis is not None}, range={stored}{rounded}"


class ActivationQuantizer(_Quantizer):
    """Fake-quantizes the input of a layer to ``bits``, and measures the l1 norm of its gradient.

    The range is per tensor and includes zero; :func:`gradl1_fast.calibrate` sets it. At float
    width the output is the input.

    Args:
        is_input: whether the tensor is the input of the network. It is data, so no penalty counts it.

    Attributes:
        bits: 1 to 16, or None for float. Set it with :func:`gradl1_fast.set_bits`.
        low: lower end of the range: a scalar for all widths, or 16 values, for 1 to 16 bits; None before
            calibration. :meth:`range_at` reads it, :meth:`set_range` sets it.
        high: upper end of the range, of the same shape.
        is_input: see above; a forward pass may find it out.
        is_mixed: whether a layer of the site is given the network's input in one call and an activation in
            another. The site is then one of an activation, and no penalty measures the call with the input.
        is_known: whether a forward pass in eager mode, or a trace, has shown which layers share the site.
        is_computed: whether a trace has shown that the tensor is an activation, whatever its values.
        name: of the site, for messages; ``<first layer>.input``.
        arming: the switch of the model; measures while it is on.
        probe: the scalar leaf whose gradient is ``sum |dL/dy|`` where a penalty on activations measures.
        step_bits: when set, the probe's gradient is multiplied by the step at this width.
        observer: watches what arrives, while ranges are found.
        move: replaces what arrives by another tensor, for finite differences.
    """

    low: Tensor | None
    high: Tensor | None
    _ranges = ("low", "high")

    def __init__(self, *, is_input: bool = False) -> None:
        super().__init__()
        self.bits = None
        self.is_input = is_input
        self.is_mixed = False
        self.is_known = False
        self.is_computed = False
        self.name = "input"
        self.step_bits: int | None = None
        self.observer: Observer | None = None
        self.move: Callable[[Tensor], Tensor] | None = None
        self.register_buffer("low", None, persistent=False)
        self.register_buffer("high", None, persistent=False)
        self.probe = _new_probe(torch.zeros(()))
        self.arming = Arming()
        self._penalties: set[int] = set()

    def measure_for(self, penalty: int, wanted: bool) -> None:
        """Measure in armed passes, or no more, for one penalty, which is known by a number of its own."""
        (self._penalties.add if wanted else self._penalties.discard)(penalty)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle as a quantizer that nobody measures or watches."""
        fresh = {"probe": _new_probe(self.probe), "_penalties": set(), "observer": None, "move": None}
        return {**super().__getstate__(), **fresh}

    @property
    def is_measured(self) -> bool:
        """Whether a penalty counts the tensor of the present forward pass."""
        if not self._penalties or self.is_input or not torch.is_grad_enabled():
            return False
        return self.arming.measuring

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do: the output is the input, and nobody looks at it."""
        return self.bits is None and self.observer is None and self.move is None and not self.is_measured

    @property
    def state(self) -> tuple[Any, ...]:
        """What must be the same for two layers to share a result."""
        return (
            self.bits,
            id(self.low),
            id(self.high),
            self.observer,
            self.move,
            self.step_bits,
            self.is_measured,
        )

    @property
    def is_foldable(self) -> bool:
        """Whether the operation before can do all that this quantizer does: its grid and its probe.

        What looks at the values themselves needs them: an observer, a step measured on them, a hook, a
        ``forward`` of its own. Hooks of all modules (``register_module_forward_hook``) do not see a
        quantizer that is folded.
        """
        own = type(self) is not ActivationQuantizer or has_own_forward(self) or has_hooks(self)
        looks = self.observer is not None or self.move is not None
        return not own and not looks and not (self.step_bits and self.is_measured)

    def forward(self, x: Tensor, measured: bool = True) -> Tensor:
        """Return the activation at the present width; without ``measured`` no penalty counts it.

        Raises:
            RuntimeError: the width is quantized and there is no range yet, or a penalty measures the tensor
                by its step under ``torch.vmap``.
        """
        if self.observer is not None:
            self.observer.update(x.detach())
        return self.quantize(x if self.move is None or not measured else self.move(x), measured)

    def quantize(self, x: Tensor, measured: bool = True) -> Tensor:
        """Return the activation at the present width, without showing it to the observer."""
        probe = self._scaled_probe(x) if measured else None
        if self.bits is None:
            # No view: only layers read it, and none of them changes it in place.
            return x if probe is None else alias(x, probe)
        scale, zero_point, q_min, q_max = self.grid(sum_dtype(x.dtype), self.bits)
        return F.fake_quantize(x, scale, zero_point, q_min, q_max, probe=probe)

    def grid(self, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor, int, int]:
        """Return the grid at ``bits``, for :func:`gradl1_fast.functional.fake_quantize`.

        Raises:
            RuntimeError: there is no range yet.
        """
        low, high = self.range_at(bits)
        return F.quantization_grid(low.to(dtype), high.to(dtype), bits, symmetric=False)

    def range_at(self, bits: int) -> tuple[Tensor, Tensor]:
        """Return the two ends of the range at a width, scalars.

        Raises:
            RuntimeError: there is no range yet.
        """
        if self.low is None or self.high is None:
            raise RuntimeError(f"no activation range for {self.name}: call gradl1_fast.calibrate first")
        if not self.low.dim():
            return self.low, self.high
        return _row(self.low, bits), _row(self.high, bits)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Store the range of the activation. Reading the values waits for the device.

        Args:
            low: lower end: a single value for all widths, or 16, for 1 to 16 bits.
            high: upper end, with as many values.

        Raises:
            ValueError: an end has another number of values, is NaN or infinite, or the ends are inverted.
        """
        if low.numel() != high.numel() or low.numel() not in (1, MAX_BITS):
            raise ValueError(
                f"low and high must each have 1 value, or {MAX_BITS} (one per width); "
                f"got {tuple(low.shape)} and {tuple(high.shape)}"
            )
        for ends in zip(low.flatten().tolist(), high.flatten().tolist(), strict=True):
            if not all(map(math.isfinite, ends)):
                raise ValueError(f"from {ends[0]} to {ends[1]}: the ends of a range must be finite")
            if ends[0] > ends[1]:
                raise ValueError(f"from {ends[0]} to {ends[1]}: the range is inverted")
        shape = (MAX_BITS,) if low.numel() > 1 else ()
        self.low, self.high = low.detach().reshape(shape), high.detach().reshape(shape)

    def step(self, x: Tensor, bits: int) -> Tensor:
        """Return the step at ``bits`` for the present range of ``x``, a differentiable scalar."""
        return F.quantization_grid(*F.value_range(x), bits, symmetric=False)[0]

    def _scaled_probe(self, x: Tensor) -> Tensor | None:
        if not self.is_measured:
            return None
        if self.step_bits is None:
            return self.probe
        if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError(
                f"GradL1: {self.name} is measured with scale='step' under torch.vmap, which loses the "
                "gradient of the step: use scale='none', or call the model on one batch at a time"
            )
        scaled = F.scale_probe(self.probe, self.step(x, self.step_bits))
        _note(scaled, "step_bits", self.step_bits)
        return scaled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.probe = _new_probe(fn(self.probe.detach()))
        return self

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this quantizer."""
        ends = "None"
        if self.low is not None and self.high is not None:
            low, high = self.range_at(self.bits or MAX_BITS)
            ends = f"[{float(low):.4g}, {float(high):.4g}]"
        return f"bits={self.bits}, range={ends}{', network input' if self.is_input else ''}"


def _note(result: Tensor, name: str, bits: int) -> None:
    """Write a width on the graph, where a penalty will ask for it that may come when it is another.

    A region that is being compiled has no graph yet.
    """
    if not torch.compiler.is_compiling() and result.grad_fn is not None:
        setattr(result.grad_fn, name, bits)


def _buffer(bits: int) -> str:
    """Return the name under which the codes of a width are kept."""
    return f"rounded_{bits}"


def _row(values: Tensor, bits: int) -> Tensor:
    """Return the entry of a width from one row for all widths, or from 16."""
    return values[0] if values.shape[0] == 1 else values[bits - 1]


def _new_probe(like: Tensor) -> Tensor:
    """Return a fresh leaf on the device of ``like``, in float32 at least: it receives a sum."""
    with torch.inference_mode(False):  # made inside, it could never require a gradient
        return torch.zeros((), dtype=sum_dtype(like.dtype), device=like.device, requires_grad=True)
