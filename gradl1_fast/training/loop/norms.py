"""How large the gradients of a network are where quantization acts: measured, not penalised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradl1_fast.nn.second_pass import RandomState, buffers_kept
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.penalty.checks.graph import require_gradients
from gradl1_fast.training.methods.activations import seen_at_sites

__all__ = ["step_norms"]


def step_norms(model: nn.Module, loss_of: Callable[[], Tensor], bits: int = 4) -> dict[str, Tensor]:
    """Return for each weight and activation its quantization step times the l1 norm of its gradient.

    Half of it is the worst first-order change of the loss when this tensor alone is quantized, in
    units of the loss. An ordinary gradient is taken; the model's buffers, its gradients and the random
    numbers are afterwards what they were.

    Args:
        model: a converted model, at float widths.
        loss_of: runs the forward pass and returns the mini-batch mean loss.
        bits: the width whose steps are taken, from the present range of each tensor.

    Returns:
        Scalars by name: ``<layer>.weight`` for weights, the name of the site for activations.
    """
    layers = {name: m for name, m in named_layers(model).items() if m.weight.requires_grad}
    randomness = RandomState()
    quantizers = named_quantizers(model)
    with buffers_kept(model):  # the backward pass may need buffers as the forward pass left them
        with parametrize.cached(), seen_at_sites(model) as activations:
            loss = loss_of()
            weights = [layer.weight for layer in layers.values()]
        tensors = [*weights, *(tensor for _, tensor in activations)]
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    randomness.replay()
    names = [*layers, *(name for name, _ in activations)]
    steps = [
        layer.weight_quantizer.step(weight, bits).detach()
        for layer, weight in zip(layers.values(), weights, strict=True)
    ]
    steps += [quantizers[name].step(tensor.detach(), bits) for name, tensor in activations]
    norms: dict[str, Tensor] = {}
    for place, (name, step, grad) in enumerate(
        zip(names, steps, require_gradients(names, grads), strict=True)
    ):
        key = f"{name}.weight".removeprefix(".") if place < len(layers) else name
        norms[key] = norms.get(key, 0) + (step * grad.float()).abs().sum()
    return norms
