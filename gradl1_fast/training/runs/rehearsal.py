"""What a network must be able to do in a run, tried on one image before the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradl1_fast.training.config import Config, Penalty
from gradl1_fast.training.methods import classes_of, settings_of

__all__ = ["check"]


def check(model: nn.Module, image: Tensor, config: Config) -> None:
    """Pass an image through, and differentiate twice if the penalty will, perhaps hours from now.

    In evaluation mode, which moves no statistics and draws no random numbers; then back to training mode.

    Args:
        model: a network in training mode.
        image: ``(1, C, H, W)``, on the device of the network.
        config: of the run.

    Raises:
        ValueError: the network does not take the image, or PyTorch cannot differentiate it twice.
    """
    name = config.model.name
    model.eval()
    try:
        y = model(image)
    except RuntimeError as error:
        raise ValueError(f"{name} does not take images of shape {tuple(image.shape[1:])}: {error}") from error
    try:
        if _needs_double_backprop(config.penalty):
            _differentiate_twice(y, [p for p in model.parameters() if p.requires_grad])
    except RuntimeError as error:
        raise ValueError(
            f"{name} cannot be differentiated twice, as {config.penalty.method} needs: {error}"
        ) from error
    finally:
        model.train()


def _needs_double_backprop(penalty: Penalty) -> bool:
    if not penalty.epochs:
        return False
    classes, settings = classes_of(penalty.method), penalty.settings
    if len(classes) == 1:
        return classes[0].needs_second_order(settings)
    return any(each.needs_second_order(settings_of(each.name, settings)) for each in classes)


def _differentiate_twice(y: Tensor, weights: list[nn.Parameter]) -> None:
    gradients = torch.autograd.grad(y.square().sum(), weights, create_graph=True, allow_unused=True)
    norms = [g.square().sum() for g in gradients if g is not None]
    torch.autograd.grad(torch.stack(norms).sum(), weights, allow_unused=True)
