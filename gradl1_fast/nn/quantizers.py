"""Quantizer modules: widths, ranges and probes. They have no parameters and no entries in the state dict."""

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
    """Observes the tensors that reach a quantizer, to find its range."""

    def update(self, x: Tensor) -> None:
        """Observe a batch."""


class _Quantizer(nn.Module):
    """Base class of the quantizers: a width, and stored ranges in at least float32."""

    bits: int | None
    _ranges: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Ranges follow the module to another device but not to half precision, where their ends may overflow.
        ranges = {name: getattr(self, name) for name in self._ranges if getattr(self, name) is not None}
        super()._apply(fn, recurse)
        for name, value in ranges.items():
            converted = getattr(self, name)
            setattr(self, name, value.to(converted.device) if converted.dtype.itemsize < 4 else converted)
        return self


class WeightQuantizer(_Quantizer):
    """Fake-quantizes a weight to ``bits``, with codes around zero.

    Values are rounded to the nearest code, unless codes were stored by :func:`gradl1_fast.round_weights`.
    Stored codes are valid only for the weight and the range they were chosen for; otherwise the quantizer
    raises.

    The range is that of the weight, from its smallest to its largest value, unless a range was stored by
    :func:`gradl1_fast.calibrate_weights`.

    Args:
        per_channel: use one range per output channel instead of one for the tensor.
        out_axis: the axis of the weight that counts output channels; 1 for a transposed convolution.

    Attributes:
        bits: 1 to 16, or None for float. Set it with :func:`gradl1_fast.set_bits`.
        axis: the axis of output channels if each has its own range; None for one range for the tensor.
        clip: the stored range is from ``-clip`` to ``clip``, and weights outside are clamped. Shape
            ``(widths, channels)``, with one row for all widths or 16 rows for 1 to 16 bits, and one column
            or one per channel. None for the range of the weight itself.
        widest: the largest supported width.
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
        """Return the weight at the current width.

        Raises:
            RuntimeError: the stored codes of this width were chosen for another weight or range.
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
        return chosen + (quantized - quantized.detach())  # the gradient of rounding to nearest

    @property
    def rounded(self) -> dict[int, Tensor]:
        """The stored codes by width: whole numbers in the shape of the weight."""
        return {bits: self.get_buffer(_buffer(bits)) for bits in self._made_for}

    def set_rounded(self, bits: int, codes: Tensor | None, made_for: MadeFor | None = None) -> None:
        """Store or remove the codes of a width.

        Args:
            bits: the width.
            codes: the codes, in the shape of the weight and within the width's grid; None to remove them.
            made_for: the weight and range that the codes were chosen for.
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
        """Return the weight and range that the codes of a width were chosen for; None without codes."""
        return self._made_for.get(bits)

    def codes_of(self, weight: Tensor, bits: int) -> Tensor:
        """Return the codes of a weight as whole numbers in float: the stored codes, or the nearest ones.

        Raises:
            RuntimeError: the stored codes of this width were chosen for another weight or range.
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
        """Whether weights may be outside the range at the current width, where they get no gradient."""
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
        """Store a range from ``-clip`` to ``clip``; see :attr:`clip`. None removes the stored range.

        Raises:
            ValueError: the shape is not allowed, or a value is negative, NaN or infinite.
        """
        if clip is not None:
            if clip.dim() != 2 or clip.shape[0] not in (1, MAX_BITS):
                raise ValueError(f"clip must have shape (1 or {MAX_BITS}, channels), got {tuple(clip.shape)}")
            if self.axis is None and clip.shape[1] != 1:
                raise ValueError(
                    f"a single range for the tensor needs one column, got {clip.shape[1]}; ranges of "
                    "channels need a model converted with per_channel=True"
                )
            if not bool((clip.isfinite() & (clip >= 0)).all()):
                raise ValueError("clip must be finite and 0 or more")
        self.clip = None if clip is None else clip.detach()

    def step(self, weight: Tensor, bits: int) -> Tensor:
        """Return the quantization step at ``bits`` for the range of the weight; differentiable.

        The shape broadcasts against the weight.
        """
        scale = F.quantization_grid(*F.value_range(weight, self.axis), bits, symmetric=True)[0]
        return along(scale, weight, self.axis)

    def extra_repr(self) -> str:
        """Return the text that ``print(model)`` shows for this quantizer."""
        stored = "own" if self.clip is None else "stored"
        rounded = f", rounded={sorted(self._made_for)}" if self._made_for else ""
        return f"bits={self.bits}, per_channel={self.axis is not None}, range={stored}{rounded}"


class ActivationQuantizer(_Quantizer):
    """Fake-quantizes the input of a layer to ``bits``, and measures the l1 norm of its gradient.

    The range is per tensor and includes zero; :func:`gradl1_fast.calibrate` sets it. In float the output
    equals the input.

    Args:
        is_input: whether the tensor is the input of the network, which no penalty counts.

    Attributes:
        bits: 1 to 16, or None for float. Set it with :func:`gradl1_fast.set_bits`.
        low: lower end of the range, a scalar for all widths or 16 values for 1 to 16 bits; None before
            calibration. Read it with :meth:`range_at` and set it with :meth:`set_range`.
        high: upper end of the range, of the same shape.
        is_input: see above; a forward pass may set it.
        is_mixed: whether the site gets the network's input in one call and an activation in another. It then
            counts as an activation, but no penalty measures the calls with the input.
        is_known: whether a forward pass in eager mode or a trace has shown which layers share the site.
        is_computed: whether a trace has shown that the tensor is an activation.
        name: the name of the site, for messages; ``<first layer>.input``.
        arming: the arming state of the model; the site measures only while it is armed.
        probe: the scalar leaf whose gradient is ``sum |dL/dy|`` if a penalty measures the site.
        step_bits: if set, the probe's gradient is multiplied by the quantization step at this width.
        observer: observes the incoming tensors during calibration.
        move: replaces the incoming tensor by another, for finite differences.
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

    def measure_for(self, penalty: int, enabled: bool) -> None:
        """Start or stop measuring in armed passes for a penalty, which is identified by a number."""
        (self._penalties.add if enabled else self._penalties.discard)(penalty)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without penalties, observer and move."""
        fresh = {"probe": _new_probe(self.probe), "_penalties": set(), "observer": None, "move": None}
        return {**super().__getstate__(), **fresh}

    @property
    def is_measured(self) -> bool:
        """Whether a penalty measures the tensor in the current forward pass."""
        if not self._penalties or self.is_input or not torch.is_grad_enabled():
            return False
        return self.arming.measuring

    @property
    def is_idle(self) -> bool:
        """Whether the output equals the input and nothing observes or measures it."""
        return self.bits is None and self.observer is None and self.move is None and not self.is_measured

    @property
    def state(self) -> tuple[Any, ...]:
        """The settings that must be equal for layers to share a result."""
        buffers = self._buffers  # faster than attributes; read for every layer in every armed pass
        return (
            self.bits,
            id(buffers["low"]),
            id(buffers["high"]),
            self.observer,
            self.move,
            self.step_bits,
            self.is_measured,
        )

    @property
    def is_foldable(self) -> bool:
        """Whether the preceding operation can take over this quantizer: its grid and its probe.

        It cannot if the values themselves are needed: by an observer, by a step that is measured on them, by
        a hook, or by an overridden ``forward``. Global module hooks (``register_module_forward_hook``) do not
        see a folded quantizer.
        """
        customized = type(self) is not ActivationQuantizer or has_own_forward(self) or has_hooks(self)
        looks = self.observer is not None or self.move is not None
        return not customized and not looks and not (self.step_bits and self.is_measured)

    def forward(self, x: Tensor, measured: bool = True) -> Tensor:
        """Return the activation at the current width; with ``measured=False`` no penalty counts it.

        Raises:
            RuntimeError: the width is quantized and there is no range yet, or a penalty with ``scale="step"``
                measures the tensor under ``torch.vmap``.
        """
        if self.observer is not None:
            self.observer.update(x.detach())
        return self.quantize(x if self.move is None or not measured else self.move(x), measured)

    def quantize(self, x: Tensor, measured: bool = True) -> Tensor:
        """Return the activation at the current width, bypassing the observer."""
        probe = self._scaled_probe(x) if measured else None
        if self.bits is None:
            # Not a view: only layers read it, and layers do not change it in place.
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
        """Return both ends of the range at a width, as scalars.

        Raises:
            RuntimeError: there is no range yet.
        """
        if self.low is None or self.high is None:
            raise RuntimeError(f"no activation range for {self.name}: call gradl1_fast.calibrate first")
        if not self.low.dim():
            return self.low, self.high
        return _row(self.low, bits), _row(self.high, bits)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Store the range of the activation. Synchronizes with the device to check the values.

        Args:
            low: lower end, a single value for all widths or 16 values for 1 to 16 bits.
            high: upper end, with the same number of values.

        Raises:
            ValueError: the number of values is wrong, a value is NaN or infinite, or the ends are inverted.
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
        """Return the quantization step at ``bits`` for the range of ``x``, a differentiable scalar."""
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
        """Return the text that ``print(model)`` shows for this quantizer."""
        ends = "None"
        if self.low is not None and self.high is not None:
            low, high = self.range_at(self.bits or MAX_BITS)
            ends = f"[{float(low):.4g}, {float(high):.4g}]"
        return f"bits={self.bits}, range={ends}{', network input' if self.is_input else ''}"


def _note(result: Tensor, name: str, bits: int) -> None:
    """Record a width in the graph, for a penalty that is called after the width has changed.

    Does nothing during compilation, when there is no graph yet.
    """
    if not torch.compiler.is_compiling() and result.grad_fn is not None:
        setattr(result.grad_fn, name, bits)


def _buffer(bits: int) -> str:
    """Return the name of the buffer with the codes of a width."""
    return f"rounded_{bits}"


def _row(values: Tensor, bits: int) -> Tensor:
    """Return the entry of a width, from a single row for all widths or from 16 rows."""
    return values[0] if values.shape[0] == 1 else values[bits - 1]


def _new_probe(like: Tensor) -> Tensor:
    """Return a new leaf on the device of ``like``, in at least float32, since its gradient is a sum."""
    with torch.inference_mode(False):  # an inference tensor cannot require a gradient
        return torch.zeros((), dtype=sum_dtype(like.dtype), device=like.device, requires_grad=True)
