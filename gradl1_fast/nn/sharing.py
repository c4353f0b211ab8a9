"""One site for layers that are given the very same tensor.

A layer that passes a tensor through its site leaves a note about it: which quantizer, and what came out. A
layer that is then given the same tensor, by identity and version, takes the result and joins the site. Notes
are kept beside tensors, not on them, so that neither pickling nor copying a tensor meets one.
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
    """What is known of a tensor that passed through a site.

    Attributes:
        quantizer: of the site.
        state: the quantizer's width, range and observer at that moment.
        version: of the tensor, which an in-place operation raises.
        result: what the quantizer returned; None if it is the tensor itself, or was not kept.
        is_itself: whether the tensor is its own result: its producer quantized and measured it.
        layers: the layers that have read it.
        hooks: the saved-tensor hooks that were on top, such as those of a checkpointed region; None without.
    """

    quantizer: ActivationQuantizer
    state: tuple[Any, ...]
    version: int
    result: Tensor | None
    is_itself: bool
    layers: set[int]
    hooks: weakref.ref[Any] | None


def pass_through(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Return the input of a layer as its site hands it on.

    Raises:
        RuntimeError: the site has no range at a quantized width.
    """
    quantizer = layer.input_quantizer
    if quantizer is None or quantizer.is_idle:
        return x
    if torch.compiler.is_compiling():
        return _while_compiling(quantizer, x)
    if x.is_inference():  # it has no version, so that nothing tells whether it has changed
        return quantizer(x)
    _begin_pass(quantizer)
    quantizer.is_known = True
    given_input = _look_for_input(quantizer, x)
    note = _note_on(x, id(layer), quantizer)
    if note is None:
        result = quantizer(x, measured=not given_input)
        leave_note(x, quantizer, result, id(layer))
        return result
    if note.quantizer is not quantizer:
        join(layer, note.quantizer)
    if note.is_itself:
        return x
    return note.quantizer.quantize(x, not given_input) if note.result is None else note.result


def _begin_pass(quantizer: ActivationQuantizer) -> None:
    """Drop the notes of the forward pass before, if this is the first that is heard of a new one."""
    if quantizer.arming.armed:
        quantizer.arming.note_run()


def _look_for_input(quantizer: ActivationQuantizer, x: Tensor) -> bool:
    """Return whether ``x`` is the network's input; take note of what the site is given."""
    if not quantizer.is_computed and is_network_input(x):
        quantizer.is_input = not quantizer.is_mixed
        return True
    if quantizer.is_input and x.requires_grad:  # what depends on parameters is not data
        quantizer.is_input, quantizer.is_mixed = False, True
    return False


def join(layer: QuantizedLayer, quantizer: ActivationQuantizer) -> None:
    """Make a layer use the site of another, which is given the very same tensor."""
    quantizer.is_known = True
    layer.input_quantizer = quantizer


def _while_compiling(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    """Share a result where layers share their quantizer: a compiled region sees no versions of tensors."""
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
    """Return the note on a tensor that a layer is given, if it holds in this forward pass.

    Raises:
        RuntimeError: the site was made in a checkpointed region, and this layer is outside of it.
    """
    note = quantizer.arming.notes.get(x)  # of another model that is given the same batch there is none
    if note is None or note.version != x._version or note.state != note.quantizer.state:
        return None
    if x.is_leaf and layer in note.layers:
        return None  # the tensor outlives a forward pass: this is the next one
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
    """Write down what a site made of a tensor."""
    _begin_pass(quantizer)
    kept = None
    if result is not None and result is not x and (result.requires_grad or quantizer.move is not None):
        kept = result  # what has no gradient is as easily made again
    layers = set() if layer is None else {layer}
    quantizer.arming.notes[x] = _Note(
        quantizer, quantizer.state, x._version, kept, is_itself, layers, _top_hooks()
    )


def _is_in_reach(note: _Note) -> bool:
    """Return whether a note was left under the same saved-tensor hooks, as in one checkpointed region.

    What is inside of a region is computed again, when notes of what came later would be there as well.
    """
    here, there = _top_hooks(), note.hooks
    if here is there is None or (here is not None and there is not None and here() is there()):
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
