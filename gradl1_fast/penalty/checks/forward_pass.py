"""Checks the forward pass that a penalty differentiates twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradl1_fast.penalty.checks.custom_functions import refuse_once_differentiable
from gradl1_fast.penalty.checks.distributed import refuse_shards
from gradl1_fast.penalty.checks.graph import (
    OTHER_SCALE,
    WHY_NOT_REACHED,
    look,
    refuse_clamped,
    refuse_cut_region,
    refuse_other_scale,
    refuse_reentrant_checkpoint,
    refuse_static_graph,
    refuse_width,
)
from gradl1_fast.penalty.measured import Site, WeightTerm

if TYPE_CHECKING:
    from gradl1_fast.penalty.gradl1 import GradL1

__all__ = ["check_forward_pass", "require_some"]


def check_forward_pass(
    penalty: GradL1, loss: Tensor, weights: Sequence[WeightTerm], sites: Sequence[Site]
) -> list[Any]:
    """Raise for conditions that would silently make the penalty wrong; return third-party custom functions.

    Widths and scales may have changed since the forward pass, so they are read from the graph.

    Raises:
        RuntimeError: names the obstacle.
    """
    if torch.compiler.is_compiling():
        _check_modules(penalty, sites)
        refuse_cut_region(loss)
        return []
    tensors = {term.name: term.tensor for term in weights}
    hidden = _parameters_of_computed(penalty) if penalty.lambda_w else {}
    graph = look(loss, tensors | {site.name: site.probe for site in sites} | hidden)
    refuse_reentrant_checkpoint(graph)
    refuse_static_graph(graph)
    refuse_once_differentiable(graph.functions)
    refuse_clamped(graph, tensors)
    for site in sites:
        refuse_other_scale(graph, site.name, site.quantizer.step_bits, penalty._step_bits)
    refuse_shards((term.name, term.tensor) for term in weights)
    _refuse_lost(graph.users, tensors, hidden)
    return graph.functions


def _parameters_of_computed(penalty: GradL1) -> dict[str, Tensor]:
    """Return the parameters of computed weights, by ``<layer>.weight`` and their own name."""
    return {
        f"{name}.weight from {parameter_name}": parameter
        for name, layer in penalty.layers.items()
        if layer.is_computed
        for parameter_name, parameter in layer.named_parameters()
        if parameter.requires_grad and parameter.dim() > 1
    }


def _refuse_lost(users: dict[str, list[Any]], tensors: dict[str, Tensor], hidden: dict[str, Tensor]) -> None:
    """Raise if a computed weight is part of the loss but was not seen in the forward pass."""
    for name in hidden:
        weight = name.partition(" from ")[0]
        if users[name] and not users.get(weight):
            raise RuntimeError(
                f"GradL1: {weight} is a computed weight, and the tensor that the forward pass used is "
                "unknown: the pass ran before this penalty armed the model, or in a checkpointed region"
            )


def _check_modules(penalty: GradL1, sites: Sequence[Site]) -> None:
    """Check widths and scales if the forward pass is compiled together with the penalty."""
    if penalty.every > 1:
        raise RuntimeError(
            "GradL1: every > 1 cannot be compiled; use every=1 and call the compiled step on every N-th step"
        )
    for name, layer in penalty.layers.items() if penalty.lambda_w else ():
        quantizer = layer.weight_quantizer
        if quantizer.bits is not None and quantizer.clamps:
            refuse_width(name, quantizer.bits)
        if layer.is_computed:
            raise RuntimeError(
                f"GradL1: the weight of {name} is computed and cannot be penalised under torch.compile"
            )
    for site in sites:
        if site.quantizer.step_bits != penalty._step_bits:
            raise RuntimeError(OTHER_SCALE.format(site.name))


def require_some(
    items: Sequence[WeightTerm] | Sequence[Site], grads: Sequence[Tensor | None], kind: str
) -> None:
    """Raise if no weight, or no activation, got a gradient.

    Raises:
        RuntimeError: names the tensors without a gradient.
    """
    if items and all(grad is None for grad in grads):
        names = ", ".join(item.name for item in items[:5]) + (" and others" if len(items) > 5 else "")
        raise RuntimeError(f"GradL1: no gradient reached any {kind}: {names}. {WHY_NOT_REACHED}")
