"""Checks the arguments of a penalty, the loss, and the requirements of a finite difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.penalty.checks.distributed import refuse_wrappers

if TYPE_CHECKING:
    from gradl1_fast.penalty.gradl1 import GradL1

__all__ = ["check_loss", "check_model", "refuse_for_finite_difference"]


def check_model(penalty: GradL1) -> None:
    """Check that the model has tensors to penalise, and nothing that prevents a second derivative.

    Raises:
        ValueError: says what is missing, or names the obstacle.
    """
    refuse_wrappers(penalty.model)
    if penalty.lambda_w and not penalty.layers:
        raise ValueError("GradL1: the model has no quantizable layer; call gradl1_fast.convert first")
    if penalty.lambda_a and not penalty.sites:
        raise ValueError(
            "GradL1: lambda_a needs activations that feed a layer, and the model has none besides its input; "
            "call gradl1_fast.convert first, or set lambda_a=0"
        )
    for name, layer in penalty.layers.items() if penalty.lambda_w else ():
        if layer.is_computed and not any(p.dim() > 1 for p in layer.parameters()):
            raise ValueError(
                f"GradL1: {name or 'the layer'} has no trainable weight; a weight read from an any-bit file "
                "cannot be trained: train the model that was saved"
            )


def check_loss(loss: Tensor) -> None:
    """Check that a loss is a single value with a graph.

    Raises:
        RuntimeError: the loss has no graph, or gradients are disabled.
        TypeError: the loss is not a tensor.
        ValueError: the loss has more than one value.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"GradL1: the loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"GradL1: the loss must be a single value, got shape {tuple(loss.shape)}")
    if not torch.is_grad_enabled():
        raise RuntimeError("GradL1: called with gradients disabled (no_grad or inference_mode)")
    if not loss.requires_grad:
        raise RuntimeError("GradL1: the loss has no graph; was it computed under no_grad or detached?")


def refuse_for_finite_difference(penalty: GradL1) -> None:
    """Raise if a finite difference cannot measure the model, for example because it is quantized.

    Raises:
        RuntimeError: names the obstacle.
    """
    quantizers = (WeightQuantizer, ActivationQuantizer)
    modules = list(penalty.model.modules())
    if any(isinstance(m, quantizers) and m.bits is not None for m in modules):
        raise RuntimeError(
            "GradL1: the finite difference needs all widths to be float; see gradl1_fast.set_bits"
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in modules):
        raise RuntimeError("GradL1: the finite difference does not average over ranks; use method='exact'")
    narrow = {layer.weight.dtype for layer in penalty.layers.values()} - {torch.float32, torch.float64}
    if narrow:
        raise RuntimeError(f"GradL1: the finite difference needs weights of float32 or float64, not {narrow}")
    computed = [name for name, layer in penalty.layers.items() if layer.is_computed]
    if computed and penalty.lambda_w:
        raise RuntimeError(
            f"GradL1: the finite difference moves parameters, and the weight of {computed[0]} is computed; "
            "use method='exact'"
        )
