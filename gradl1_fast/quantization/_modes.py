"""Runs a model in evaluation mode and in float, and restores its state afterwards."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gradl1_fast._progress import track
from gradl1_fast.nn.sharing import mark_input
from gradl1_fast.quantization.bits import bits

__all__ = ["Forward", "at_present_widths", "call", "call_with", "evaluation", "lasting", "moved", "run"]

Forward = Callable[[nn.Module, Any], Any]


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, float and no gradients inside the block, then restore each module's mode."""
    with at_present_widths(model), bits(model, w=None, a=None):
        yield


@contextlib.contextmanager
def at_present_widths(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and no gradients inside the block, then restore each module's mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not inference mode: its tensors have no version, by which sites recognise a tensor.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def run(
    model: nn.Module,
    batches: Iterable[Any],
    caller: str,
    forward: Forward | None = None,
    first: Callable[[nn.Module, Callable[[], Any]], Any] | None = None,
) -> None:
    """Run the model on each batch, with a progress bar; ``caller`` is used in messages.

    If given, ``first(model, run)`` runs the first batch.

    Raises:
        TypeError: ``batches`` is a single tensor or mapping instead of a list of batches.
        ValueError: there is no batch.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            f"{caller}: batches is a tensor of shape {tuple(batches.shape)}; put it in a list: [x]"
        )
    if isinstance(batches, Mapping):
        raise TypeError(f"{caller}: batches is a mapping; put it in a list: [batch]")
    count = 0
    for batch in track(batches, caller):
        if first is not None and not count:
            first(model, partial(call, model, batch, forward))
        else:
            call(model, batch, forward)
        count += 1
    if not count:
        raise ValueError(f"{caller}: got no batches (an iterator can be used only once)")


def lasting(caller: str, batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches that can be iterated several times; ``caller`` is used in messages.

    Raises:
        TypeError: they are an iterator.
    """
    if iter(batches) is batches:
        raise TypeError(
            f"{caller}: batches is an iterator, which can be used only once; pass a list or a loader"
        )
    return batches


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run the model on a batch of a data loader, moved to the device of the model.

    The first entry of a tuple or list is the input, and a mapping holds the keyword arguments. For other
    calls, pass ``forward(model, batch)``. Sites that get a tensor of the batch, or an argument of the model,
    are marked as sites of the network's input.

    Raises:
        TypeError: the model does not accept the batch; the message says how batches are passed.
    """
    if forward is None:
        batch = moved(model, batch[0] if isinstance(batch, tuple | list) else batch)
        _check_call(model, batch)
        with _inputs_marked(model):
            return model(**batch) if isinstance(batch, Mapping) else model(batch)
    batch = moved(model, batch)
    with _inputs_marked(model):
        for value in tree_leaves(batch):
            _mark(value)
        return forward(model, batch)


def _check_call(model: nn.Module, batch: Any) -> None:
    """Check that the model accepts a batch, before its own error says less."""
    if type(batch).__module__ == "numpy":
        raise TypeError("a batch is a NumPy array; pass tensors, such as torch.from_numpy(batch)")
    if model._forward_pre_hooks:  # they may change the arguments
        return
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # not a function of Python
        return
    try:
        signature.bind(**batch) if isinstance(batch, Mapping) else signature.bind(batch)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} cannot be called with a batch: {error}. The first entry of a tuple or "
            "list is its input, and a mapping holds its keyword arguments; for other calls pass "
            "forward=lambda model, batch: model(*batch)"
        ) from error


def call_with(model: nn.Module, inputs: Any, forward: Forward | None = None) -> Any:
    """Run the model on its inputs: a single input, a tuple of inputs, or a mapping of keyword arguments."""
    inputs = moved(model, inputs)
    if forward is not None:
        return forward(model, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def moved(model: nn.Module, batch: Any) -> Any:
    """Return a batch with its tensors on the device of the model's first parameter."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone().to(device) if value.is_inference() else value.to(device)
        # Such as the batch of a tokenizer, a mapping that PyTorch does not flatten.
        return value.to(device) if isinstance(value, Mapping) and hasattr(value, "to") else value

    return tree_map(move, batch)


@contextlib.contextmanager
def _inputs_marked(model: nn.Module) -> Iterator[None]:
    """Mark the arguments of the model as inputs of the network."""

    def mark(_module: nn.Module, args: Any, kwargs: Any) -> None:
        for value in tree_leaves((args, kwargs)):
            _mark(value)

    hook = model.register_forward_pre_hook(mark, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _mark(value: Any) -> None:
    if isinstance(value, Tensor):
        mark_input(value)
