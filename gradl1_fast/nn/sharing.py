"""Shares a site among layers with the same input tensor.

A layer that passes a tensor through its site records a note with the quantizer and the result. A later layer
with the same tensor, by identity and version, reuses the result and joins the site. Notes are stored in a
separate table, not on tensors, so they do not affect pickling or copying a tensor.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradl1_fast.nn.arming import is_recomputing
from gradl1_fast.nn.inputs import is_network_input, mark_input

if TYPE_CHECKING:
    from gradl1_fast.nn.layers import QuantizedLayer
    from gradl1_fast.nn.quantizers import ActivationQuantizer

__all__ = ["join", "leave_note", "mark_input", "pass_through"]


@dataclass(eq=False)
class _Note:
    """A record of a tensor that passed through a site.

    Attributes:
        quantizer: the quantizer of the site.
        state: the quantizer's width, range and observer at that time.
        version: the version of the tensor, which in-place operations increment.
        result: the result of the quantizer; None if it is the tensor itself or was not stored.
        is_itself: whether the tensor is its own result, because its producer quantized and measured it.
        layers: the layers that have read the tensor.
        hooks: the innermost saved-tensor hooks, such as those of a checkpointed region; None without hooks.
    """

    quantizer: ActivationQuantizer
    state: tuple[Any, ...]
    version: int
    result: Tensor | None
    is_itself: bool
    layers: set[int]
    hooks: weakref.ref[Any] | None


def pass_through(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Return the input of a layer after its site.

    Raises:
        RuntimeError: the site has no range at a quantized width.
        TypeError: the input is None.
    """
    quantizer = layer.input_quantizer
    if quantizer is None or quantizer.is_idle:
        return x
    if x is None:
        raise TypeError(f"{quantizer.name} must be a tensor, got None: was every input passed to the model?")
    if torch.compiler.is_compiling():
        return _while_compiling(quantizer, x)
    if x.is_inference():  # without a version, changes cannot be detected
        return quantizer(x)
    _begin_pass(quantizer)
    quantizer.is_known = True
    is_input = _look_for_input(quantizer, x)
    note = _note_on(x, id(layer), quantizer)
    if note is None:
        result = quantizer(x, measured=not is_input)
        leave_note(x, quantizer, result, id(layer))
        return result
    if note.quantizer is not quantizer:
        join(layer, note.quantizer)
    if note.is_itself:
        return x
    return note.quantizer.quantize(x, not is_input) if note.result is None else note.result


def _begin_pass(quantizer: ActivationQuantizer) -> None:
    """Drop the notes of the previous forward pass if a new one has started."""
    if quantizer.arming.armed:
        quantizer.arming.note_run()


def _look_for_input(quantizer: ActivationQuantizer, x: Tensor) -> bool:
    """Return whether ``x`` is the network's input, and record it on the site."""
    if not quantizer.is_computed and is_network_input(x):
        quantizer.is_input = not quantizer.is_mixed
        return True
    if quantizer.is_input and x.requires_grad:  # a tensor that depends on parameters is not data
        quantizer.is_input, quantizer.is_mixed = False, True
    return False


def join(layer: QuantizedLayer, quantizer: ActivationQuantizer) -> None:
    """Make a layer use the site of another layer with the same input tensor."""
    quantizer.is_known = True
    layer.input_quantizer = quantizer


def _while_compiling(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """Share a result among layers with the same quantizer, since compiled code sees no tensor versions."""
    if quantizer.is_mixed and quantizer.is_measured:
        raise RuntimeError(
            f"{quantizer.name} receives the network's input in one call and an activation in another, which "
            "a compiled step cannot tell apart; run the penalised step in eager mode"
        )
    of_tensor: Any = x
    note = getattr(of_tensor, "_gradl1_note", None)
    if note is not None:
        if note[0] is quantizer:
            return note[1]
        if not (quantizer.is_known and note[0].is_known):
            raise RuntimeError(
                f"{quantizer.name} receives the tensor of another site under torch.compile, and the model "
                "has not run yet: pass one batch through it in eager mode first, as calibrate does"
            )
    result = quantizer(x)
    of_tensor._gradl1_note = quantizer, result
    return result


def _note_on(x: Tensor, layer: int, quantizer: ActivationQuantizer) -> _Note | None:
    """Return the note on the input tensor of a layer, if it is valid in this forward pass.

    Raises:
        RuntimeError: the site was made in a checkpointed region, and this layer is outside of it.
    """
    note = quantizer.arming.notes.get(x)  # notes are separate for each model
    if note is None or note.version != x._version or note.state != note.quantizer.state:
        return None
    if x.is_leaf and layer in note.layers:
        return None  # a leaf outlives a forward pass: this is a new pass
    if not _is_in_reach(note):
        return None
    note.layers.add(layer)
    return note


def leave_note(
    x: Tensor,
    quantizer: ActivationQuantizer,
    result: Tensor | None,
    layer: int | None,
    *,
    is_itself: bool = False,
) -> None:
    """Record the result of a site for a tensor."""
    _begin_pass(quantizer)
    stored = None
    if result is not None and result is not x and (result.requires_grad or quantizer.move is not None):
        stored = result  # a result without a gradient is cheap to recompute
    layers = set() if layer is None else {layer}
    quantizer.arming.notes[x] = _Note(
        quantizer, quantizer.state, x._version, stored, is_itself, layers, _top_hooks()
    )


def _is_in_reach(note: _Note) -> bool:
    """Return whether a note was recorded under the same saved-tensor hooks, as in one checkpointed region.

    When a region is recomputed, notes of later operations already exist and must not be used.
    """
    current, recorded = _top_hooks(), note.hooks
    if current is recorded is None or (
        current is not None and recorded is not None and current() is recorded()
    ):
        return True
    if not is_recomputing() and note.quantizer.is_measured:
        raise RuntimeError(
            f"GradL1: the tensor at {note.quantizer.name} is read by a layer inside a checkpointed region "
            "and by one outside it or in another region; checkpoint both together, or neither"
        )
    return False


def _top_hooks() -> weakref.ref[Any] | None:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else weakref.ref(hooks[0])
