"""Tensors by name as the state dict of a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["load_entries"]


def load_entries(model: nn.Module, entries: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load tensors that were read from a file into a model.

    The versions of its classes, which a state dict holds beside its tensors, are those of the model: some
    classes, such as torchvision's ``MNASNet``, load nothing without one.

    Args:
        model: gets the tensors.
        entries: by name.
        strict: whether every name of the model must be there, and no other.

    Raises:
        RuntimeError: a name or shape is not the model's.
    """
    state = OrderedDict(entries)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # where PyTorch keeps versions
    model.load_state_dict(state, strict=strict)
