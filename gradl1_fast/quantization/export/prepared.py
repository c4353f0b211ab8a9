"""What every format starts from: the model with its batch norms folded, at the widths to be exported."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gradl1_fast.nn.converted import ConvertedModel
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization.bits import check_width, set_bits
from gradl1_fast.quantization.folding import Folding, fold_batch_norm
from gradl1_fast.quantization.sliced import SlicedWeight

__all__ = ["NotExportableError", "Prepared", "ends", "prepare"]


class NotExportableError(ValueError):
    """The model has something that export cannot say; the message names it."""


@dataclass(frozen=True)
class Prepared:
    """A model to be exported. It is the simulation with which the exported one must agree.

    Attributes:
        model: folded, at its widths, in evaluation mode.
        folding: what became of the batch norms.
        w: bits of the weights, None for float.
        a: bits of the activations, None for float.
    """

    model: ConvertedModel
    folding: Folding
    w: int | None
    a: int | None

    def remarks(self) -> list[str]:
        """Return a sentence on each batch norm that was not folded."""
        return [f"{name} {reason}: not folded" for name, reason in self.folding.refused.items()]


def prepare(model: nn.Module, inputs: Tensor, *, w: int | None, a: int | None) -> Prepared:
    """Fold the batch norms of a model into a copy of it and set the widths of that.

    Args:
        model: a converted model in evaluation mode, in float32, calibrated if ``a`` is given. It stays as
            it is.
        inputs: a batch, on which folding is measured.
        w: bits of the weights, 1 to 8 or 16, or None for float.
        a: bits of the activations, likewise.

    Raises:
        NotExportableError: the model is in training mode, in another type, or has no graph or no weights.
        RuntimeError: an activation has no range yet.
        TypeError: a width is not an int or None.
        ValueError: a width is out of range.
    """
    for name, value in (("w", w), ("a", a)):
        check_width(name, value)
        if value is not None and 8 < value < 16:
            raise ValueError(f"{name}: export has widths 1 to 8 and 16, got {value}")
    _check_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is not folded is in the result
        folding = fold_batch_norm(model, inputs)
    if not isinstance(folding.model, ConvertedModel):
        raise RuntimeError("folding has lost the graph")
    set_bits(folding.model, w=w, a=a)
    return Prepared(folding.model, folding, w, a)


def ends(model: ConvertedModel) -> tuple[fx.Node, fx.Node]:
    """Return the nodes of the input and of the output.

    Raises:
        NotExportableError: there are several.
    """
    begin = [node for node in model.graph.nodes if node.op == "placeholder"]
    end = next(node for node in model.graph.nodes if node.op == "output").args[0]
    if len(begin) != 1 or not isinstance(end, fx.Node):
        raise NotExportableError("the model must have one tensor as its input and one tensor as its output")
    return begin[0], end


def _check_model(model: nn.Module) -> None:
    layers = named_layers(model)
    if not layers:
        raise NotExportableError("the model is not converted: call gradl1_fast.convert(model) first")
    if model.training:
        raise NotExportableError("the model is in training mode: call model.eval() first")
    if not isinstance(model, ConvertedModel):
        raise NotExportableError(
            f"{type(model).__name__} was not traced as it was converted: it has no graph"
        )
    ends(model)
    for name, layer in layers.items():
        if isinstance(layer.weight_quantizer, SlicedWeight):
            raise NotExportableError(f"{name} holds bits of an any-bit file, no float weight; export the run")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise NotExportableError(
                f"{name} is {value.dtype}; export is for float32: call model.float() first"
            )
