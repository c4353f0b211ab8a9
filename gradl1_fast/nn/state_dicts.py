"""Loading of tensors by name into a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["load_entries"]


def load_entries(model: nn.Module, entries: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load tensors that were read from a file into a model.

    The metadata of the state dict, with the versions of its classes, is taken from the model. Some classes,
    such as torchvision's ``MNASNet``, require a version to load.

    Args:
        model: the model to load into.
        entries: the tensors by name.
        strict: require the names to be exactly those of the model.

    Raises:
        RuntimeError: a name or a shape does not match the model.
    """
    state = OrderedDict(entries)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # where PyTorch keeps versions
    model.load_state_dict(state, strict=strict)
