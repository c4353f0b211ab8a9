"""Adaptive sharpness-aware minimisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast.training.methods.interface import Family, Variant
from gradl1_fast.training.methods.sign_sam import SignSAM

__all__ = ["ASAM", "adaptive_move"]


def adaptive_move(weights: list[Tensor], grads: list[Tensor], size: float) -> list[Tensor]:
    """Return ``size * w^2 g / ||w g||_2`` of each weight, with one norm over all weights.

    Args:
        weights: weights of any shapes.
        grads: gradients of the loss, in the same shapes.
        size: radius of the ball in units of the relative change.
    """
    products = [(weight * grad).flatten() for weight, grad in zip(weights, grads, strict=True)]
    norm = torch.linalg.vector_norm(torch.cat(products)).clamp(min=torch.finfo(products[0].dtype).tiny)
    return [size * weight.square() * grad / norm for weight, grad in zip(weights, grads, strict=True)]


class ASAM(SignSAM):
    """The loss at ``W + rho W^2 g / ||W g||_2``: the sharpness under changes relative to each weight.

    Only quantizable weights are moved, and the move is not differentiated. Each step takes two passes;
    batch-norm statistics are those of the first pass.

    Args:
        model: a converted model.
        rho: size of the move, multiplied by ``strength``.

    Raises:
        ValueError: rho is negative or not finite, or no weight is trained.

    Source: Kwon et al. 2021, arXiv 2102.11600.
    """

    name = "asam"
    text = "adaptive sharpness-aware minimisation"
    source = "Kwon et al. 2021, arXiv 2102.11600"
    family = Family.GRADIENTS
    variants = (Variant("asam", "sharpness-aware minimisation, moves relative to the weights", {"rho": 0.5}),)

    def __init__(self, model: nn.Module, *, rho: float) -> None:
        super().__init__(model, epsilon=rho)

    def move(self, weights: list[Tensor], grads: list[Tensor], size: float) -> list[Tensor]:
        """See :func:`adaptive_move`."""
        return adaptive_move(weights, grads, size)
