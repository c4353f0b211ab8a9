"""Peers within PyTorch that transform the step as a whole: torch.compile, and torch.func's jvp over grad."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from bench import sites
from bench.steps import TorchStep
from bench.workloads import Task

__all__ = ["CompiledStep", "JvpStep"]

Tensors = dict[str, Tensor]


class CompiledStep(TorchStep):
    """Loss, penalty and backward pass in one compiled region; the optimiser as in the other steps.

    Args:
        task: what it runs on.
        model: whose parameters are differentiated.
        forward: returns logits and penalised activations of images.
        penalty: returns the penalty of the loss and those activations; None for the plain step.
        backend: of torch.compile.
    """

    shows_operators = False

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        forward: Callable[[Tensor], tuple[Tensor, Sequence[Tensor]]],
        penalty: Callable[[Tensor, Sequence[Tensor]], Tensor] | None,
        backend: str,
    ) -> None:
        super().__init__(model)
        self.x, self.y, self.parameters = task.x, task.y, list(model.parameters())

        def gradients(x: Tensor, y: Tensor) -> Sequence[Tensor]:
            logits, activations = forward(x)
            loss = F.cross_entropy(logits, y)
            total = loss if penalty is None else loss + penalty(loss, activations)
            return torch.autograd.grad(total, self.parameters)

        self.compiled = torch.compile(gradients, backend=backend, fullgraph=True)

    def backward(self) -> None:
        """Compute the gradients and leave them in ``grad``."""
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            for parameter, gradient in zip(self.parameters, self.compiled(self.x, self.y), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class JvpStep(TorchStep):
    """The penalty's gradient as a Hessian-vector product: jvp over grad in the direction of the signs.

    Batch norm keeps no running statistics here, since torch.func cannot update them in place.

    Args:
        task: what it runs on.
        lambda_w: coefficient of the weights' term.
        lambda_a: coefficient of the activations' term.
        backend: of torch.compile; None for eager.
    """

    def __init__(self, task: Task, lambda_w: float, lambda_a: float, backend: str | None) -> None:
        model = task.network()
        super().__init__(model)
        self.places = [torch.zeros(shape, device=task.x.device) for shape in sites.shapes(model, task.x)]
        displaced = sites.displaced(model)
        _forget_statistics(displaced)
        self.x, self.y = task.x, task.y

        def loss(parameters: Tensors, places: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(displaced, parameters, (x, *places)), y)

        def gradients(parameters: Tensors, places: list[Tensor], x: Tensor, y: Tensor) -> Tensors:
            of_weights, of_places = grad(loss, argnums=(0, 1))(parameters, places, x, y)
            direction = (
                {
                    n: lambda_w * g.sign() if g.dim() > 1 else torch.zeros_like(g)
                    for n, g in of_weights.items()
                },
                [lambda_a * g.sign() for g in of_places],
            )
            value, tangent = jvp(lambda p, a: grad(loss)(p, a, x, y), (parameters, places), direction)[:2]
            return {name: value[name] + tangent[name] for name in value}

        self.shows_operators = backend is None
        self.compute = gradients if backend is None else torch.compile(gradients, backend=backend)

    def backward(self) -> None:
        """Compute the gradients and leave them in ``grad``."""
        named = dict(self.model.named_parameters())
        gradients = self.compute({n: p.detach() for n, p in named.items()}, self.places, self.x, self.y)
        for name, parameter in named.items():
            new = gradients[name]
            parameter.grad = new if parameter.grad is None else parameter.grad + new


def _forget_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
