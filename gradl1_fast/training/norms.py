"""How large the gradients of a network are where quantization acts: measured, not penalised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast.graph_checks import require_gradients
from gradl1_fast.nn.sites import activation_sites, named_layers
from gradl1_fast.second_pass import RandomState, buffers_kept

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
        Scalars by name: ``<layer>.weight`` for weights, the quantizer's name for activations.
    """
    layers = {name: m for name, m in named_layers(model).items() if m.weight.requires_grad}
    randomness = RandomState()
    outputs: list[tuple[str, Tensor, Tensor]] = []
    with buffers_kept(model):
        loss = _watched(model, loss_of, bits, outputs)
    randomness.replay()
    weights = [layer.weight for layer in layers.values()]
    names = [*layers, *(name for name, _, _ in outputs)]
    grads = torch.autograd.grad(loss, [*weights, *(output for _, output, _ in outputs)], allow_unused=True)
    steps = [layer.weight_quantizer.step(layer.weight, bits).detach() for layer in layers.values()]
    steps += [step for _, _, step in outputs]
    norms: dict[str, Tensor] = {}
    for place, (name, step, grad) in enumerate(
        zip(names, steps, require_gradients(names, grads), strict=True)
    ):
        key = f"{name}.weight".removeprefix(".") if place < len(layers) else name
        norms[key] = norms.get(key, 0) + (step * grad.float()).abs().sum()
    return norms


def _watched(
    model: nn.Module, loss_of: Callable[[], Tensor], bits: int, outputs: list[tuple[str, Tensor, Tensor]]
) -> Tensor:
    """Run the forward pass; collect the activations of each site and their steps."""

    def watch(site: Any) -> Callable[..., Tensor]:
        def note(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # behind frozen layers alone
                output = output.detach().requires_grad_()
            outputs.append((site.name, output, site.quantizer.step(output.detach(), bits)))
            return output

        return note

    handles = [site.producer.register_forward_hook(watch(site)) for site in activation_sites(model)]
    try:
        return loss_of()
    finally:
        for handle in handles:
            handle.remove()
