"""Each objective once more, by ordinary autograd in float64 on a plain network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests import oracle
from tests.networks import NO_NORM, VGG, Network, layers

Gradients = dict[str, Tensor]
LAMBDAS = {"lambda_w": 0.3, "lambda_a": 0.2}
SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "gradl1": {**LAMBDAS, "scale": "none"},
    "l2": LAMBDAS,
    "sam": {"epsilon": 0.01},
    "kure": {"coefficient": 0.7},
    "defensive": {"beta": 0.4},
    "qat": {"w": 4, "a": 4},
}


def network_of(name: str) -> Network:
    """Return the network on which an objective is compared."""
    return NO_NORM if name == "qat" else VGG


def gradients(name: str, **changes: object) -> Gradients:
    """Return the gradient of the whole objective by parameter."""
    network = network_of(name)
    model = network.make()
    return _TRUTHS[name](network, model, **{**SETTINGS[name], **changes})


def differentiate(total: Tensor, model: nn.Module) -> Gradients:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _weights(model: nn.Module) -> list[Tensor]:
    return [model.get_submodule(name).weight for name in layers(model)]


def _measure(network: Network, model: nn.Module) -> oracle.Measured:
    names = layers(model)
    weights = [f"{name}.weight" for name in names]
    return oracle.measure(model, network.loss, weights=weights, inputs_of=names[1:])


def _plain(network: Network, model: nn.Module) -> Gradients:
    return differentiate(network.loss(model), model)


def _gradl1(network: Network, model: nn.Module, **settings: object) -> Gradients:
    parameters = dict(model.named_parameters())
    return oracle.penalised_gradients(lambda: _measure(network, model), parameters, **settings).gradients


def _l2(network: Network, model: nn.Module, lambda_w: float, lambda_a: float) -> Gradients:
    m = _measure(network, model)
    tensors = [*m.weights.values(), *m.activations.values()]
    grads = torch.autograd.grad(m.loss, tensors, create_graph=True)
    norms = [(g**2).sum() ** 0.5 for g in grads]
    count = len(m.weights)
    return differentiate(m.loss + lambda_w * sum(norms[:count]) + lambda_a * sum(norms[count:]), model)


def _sam(network: Network, model: nn.Module, epsilon: float) -> Gradients:
    weights = _weights(model)
    signs = [g.sign() for g in torch.autograd.grad(network.loss(model), weights)]
    with torch.no_grad():
        for weight, sign in zip(weights, signs, strict=True):
            weight += epsilon * sign
    return differentiate(network.loss(model), model)


def _kure(network: Network, model: nn.Module, coefficient: float) -> Gradients:
    def kurtosis(w: Tensor) -> Tensor:
        deviations = w - w.mean()
        return (deviations**4).mean() / (deviations**2).mean() ** 2

    found = [kurtosis(w) for w in _weights(model)]
    penalty = sum((k - 1.8) ** 2 for k in found) / len(found)
    return differentiate(network.loss(model) + coefficient * penalty, model)


def _defensive(network: Network, model: nn.Module, beta: float) -> Gradients:
    """The gradient in closed form: ``2 beta (W W^T - I) W``."""
    result = differentiate(network.loss(model), model)
    for name in layers(model):
        w = model.get_submodule(name).weight.detach()
        rows = w.reshape(len(w), -1)
        own = 2 * beta * (rows @ rows.T @ rows - rows)
        result[f"{name}.weight"] = result[f"{name}.weight"] + own.reshape(w.shape)
    return result


def _qat(network: Network, model: nn.Module, w: int, a: int) -> Gradients:
    """Layers called by hand, weights and inputs of layers on grids of their own ranges, images at 8 bits."""
    x, y = network.batch()
    bits = max(a, 8)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            x, bits = _on_affine_grid(x, bits), a
            operation = nn.functional.linear if isinstance(module, nn.Linear) else nn.functional.conv2d
            geometry = (
                {} if isinstance(module, nn.Linear) else {"stride": module.stride, "padding": module.padding}
            )
            x = operation(x, _on_symmetric_grid(module.weight, w), module.bias, **geometry)
        else:
            x = module(x)
    return differentiate(nn.functional.cross_entropy(x, y), model)


def _on_affine_grid(x: Tensor, bits: int) -> Tensor:
    step = oracle.affine_step(x.detach(), bits)
    zero = torch.round(-x.detach().min().clamp(max=0) / step)
    return oracle.fake_quantize(x, step, zero, 0, 2**bits - 1)


def _on_symmetric_grid(w: Tensor, bits: int) -> Tensor:
    limit = 2 ** (bits - 1) - 1
    return oracle.fake_quantize(w, oracle.symmetric_step(w.detach(), bits), torch.zeros(()), -limit, limit)


_TRUTHS: dict[str, Callable[..., Gradients]] = {
    "plain": _plain,
    "gradl1": _gradl1,
    "l2": _l2,
    "sam": _sam,
    "kure": _kure,
    "defensive": _defensive,
    "qat": _qat,
}
