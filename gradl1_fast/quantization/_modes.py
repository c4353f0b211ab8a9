"""How a model is run to look at it: in evaluation mode, in float, and then as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast._progress import track
from gradl1_fast.quantization.bits import bits

__all__ = ["evaluation", "first_input", "run"]


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, float and no gradients for the block; each module gets its mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with bits(model, w=None, a=None), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def run(model: nn.Module, batches: Iterable[Any], what: str) -> None:
    """Run the model on each batch, with a progress bar; ``what`` names the caller.

    Raises:
        TypeError: ``batches`` is a single tensor, whose first dimension would be taken for the batches.
        ValueError: there is no batch.
    """
    if isinstance(batches, Tensor):
        raise TypeError(f"{what}: batches is a tensor of shape {tuple(batches.shape)}; put it in a list: [x]")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for batch in track(batches, what):
        x = first_input(batch)
        model(x.to(device) if isinstance(x, Tensor) else x)
        count += 1
    if not count:
        raise ValueError(f"{what}: got no batches; an iterator that was used before is empty")


def first_input(batch: Any) -> Any:
    """Return the input of a batch as a data loader gives it: the first entry of a tuple or list."""
    return batch[0] if isinstance(batch, tuple | list) else batch
