"""Float64 truth: the gradient of loss plus penalty by ordinary automatic differentiation.

It imports nothing of gradl1_fast, and a test holds it against the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["relative_error", "true_gradients"]

Gradients = Mapping[str, Tensor]


def true_gradients(
    make: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    lambda_w: float,
    lambda_a: float,
    step_bits: int | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of ``loss + lambda_w sum |dL/dW| + lambda_a sum |dL/dY|`` by parameter.

    W are the weights of convolutions and linear layers; Y the distinct tensors that they are given and that
    depend on a parameter, and dL/dY what comes back from these layers, not from what else reads the tensor.

    Args:
        make: returns the network.
        x: images, of any floating type.
        y: labels.
        lambda_w: coefficient of the weights' term.
        lambda_a: coefficient of the activations' term.
        step_bits: multiplies each norm by the quantization step of its tensor at this width; None does not.
    """
    model = make().to(x.device).double()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    inputs: dict[int, tuple[Tensor, Tensor]] = {}  # what layers are given, and their own

    def give(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args[0].requires_grad:
            return None
        return (inputs.setdefault(id(args[0]), (args[0], args[0] * 1))[1],)

    for layer in layers:
        layer.register_forward_pre_hook(give)
    loss = total = F.cross_entropy(model(x.double()), y)
    activations = [own for _, own in inputs.values()]
    for factor, step, measured in (
        (lambda_w, _step_of_weight, [m.weight for m in layers]),
        (lambda_a, _step_of_activation, activations),
    ):
        if factor:
            grads = torch.autograd.grad(loss, measured, create_graph=True)
            steps = [1.0 if step_bits is None else step(t, step_bits) for t in measured]
            total = total + factor * sum(s * g.abs().sum() for s, g in zip(steps, grads, strict=True))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters), strict=True))


def _step_of_weight(weight: Tensor, bits: int) -> Tensor:
    return weight.abs().amax() / (2 ** (bits - 1) - 1)


def _step_of_activation(y: Tensor, bits: int) -> Tensor:
    return (y.amax().clamp(min=0) - y.amin().clamp(max=0)) / (2**bits - 1)


def relative_error(gradients: Gradients, truth: Gradients) -> float:
    """Return the distance of a whole gradient from the true one, relative to the norm of the true one.

    Raises:
        ValueError: names or shapes differ.
    """
    if gradients.keys() != truth.keys():
        raise ValueError(f"gradients of other parameters: {sorted(gradients.keys() ^ truth.keys())}")
    wrong = [name for name in truth if gradients[name].shape != truth[name].shape]
    if wrong:
        raise ValueError(f"gradients of another shape: {wrong}")
    found, true = (torch.cat([g[n].double().cpu().flatten() for n in truth]) for g in (gradients, truth))
    return float((found - true).norm() / true.norm())
