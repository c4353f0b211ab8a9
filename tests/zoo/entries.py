"""What a row of the table stands for: a model with random weights, its inputs and its training recipe."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | dict[str, Tensor]

# Higher than people train with, so that a small network drops something in every run.
RECIPE = {"drop_path_rate": 0.3, "drop_rate": 0.2}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        family: the group it is counted in.
        name: unique in the table.
        build: creates the model; keyword arguments are those of the training recipe.
        batch: creates its inputs in float64: one tensor, or keyword arguments.
        recipe: keyword arguments that switch on drop path and dropout, where the factory has them.
        tolerance: largest allowed difference of the penalised gradient, relative to the largest gradient.
    """

    family: str
    name: str
    build: Callable[..., nn.Module]
    batch: Callable[[], Batch]
    recipe: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 1e-8


def run(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def timm(family: str, names: str, size: int = 64, tolerance: float = 1e-8, **options: Any) -> list[Entry]:
    """Return rows for timm models; the factory gets ``options``."""

    def row(name: str) -> Entry:
        def build(**recipe: float) -> nn.Module:
            create = importlib.import_module("timm").create_model
            return create(name, pretrained=False, **({"num_classes": 10} | options), **recipe)

        return Entry(family, f"timm/{name}", build, lambda: noise(2, 3, size, size), RECIPE, tolerance)

    return [row(name) for name in names.split()]


def torchvision(
    family: str,
    names: str,
    *shape: int,
    module: str = "",
    linear: Mapping[str, tuple[int, int]] | None = None,
    **options: Any,
) -> list[Entry]:
    """Return rows for torchvision models.

    Args:
        family: of all of them.
        names: of factories, separated by spaces.
        *shape: of the input; images of 64 x 64 by default.
        module: where the factories are, below ``torchvision.models``.
        linear: sizes of linear layers that are replaced, too large for a zoo.
        **options: arguments of the factory.
    """

    def row(name: str) -> Entry:
        def build() -> nn.Module:
            factory = getattr(importlib.import_module("torchvision.models" + module), name.partition(":")[0])
            known = inspect.signature(factory).parameters
            none = {key: None for key in ("weights", "weights_backbone") if key in known}
            backbone = {"backbone_name": name.partition(":")[2]} if ":" in name else {}
            model = factory(**none, **backbone, **options)
            for path, sizes in (linear or {}).items():
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, nn.Linear(*sizes))
            return model

        return Entry(family, f"torchvision/{name}", build, lambda: noise(*(shape or (2, 3, 64, 64))))

    return [row(name) for name in names.split()]


def hf(
    family: str, head: str, names: str, batch: Callable[[], Batch], config: Mapping[str, Any], **more: Any
) -> list[Entry]:
    """Return rows for transformers models, such as ``Bert`` with the head ``ForMaskedLM``.

    Each is made from a small configuration: ``config`` and what follows it.
    """

    def row(name: str) -> Entry:
        def build() -> nn.Module:
            home = importlib.import_module("transformers")
            return getattr(home, name + head)(getattr(home, f"{name}Config")(**config, **more))

        return Entry(family, f"transformers/{name}{head}", build, batch)

    return [row(name) for name in names.split()]


def text() -> dict[str, Tensor]:
    """Two sentences of words 3 to 98, the second of them padded."""
    ids = torch.randint(3, 99, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text_pair() -> dict[str, Tensor]:
    return text() | {"decoder_input_ids": torch.randint(3, 99, (2, 7))}


def pixels(*shape: int) -> Callable[[], Batch]:
    return lambda: {"pixel_values": noise(2, *shape)}


def captioned(*shape: int) -> Callable[[], Batch]:
    return lambda: {"pixel_values": noise(2, *shape), "input_ids": torch.randint(3, 99, (2, 12))}


def values(name: str, *shape: int) -> Callable[[], Batch]:
    return lambda: {name: noise(2, *shape)}


def transcribed(*shape: int) -> Callable[[], Batch]:
    return lambda: {"input_features": noise(2, *shape), "decoder_input_ids": torch.randint(3, 99, (2, 7))}
