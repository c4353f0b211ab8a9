"""What is measured on a network beside its accuracy: norms of gradients, and how far they foretell losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.second_pass import shifted
from gradl1_fast.nn.sites import named_layers, named_quantizers
from gradl1_fast.quantization import bits
from gradl1_fast.quantization.bits import INPUT_BITS, width_at
from gradl1_fast.training.data import Batch
from gradl1_fast.training.methods.activations import seen_at_sites
from gradl1_fast.training.methods.weights import trainable_weights

__all__ = ["Alone", "Change", "Norms", "alone", "changes", "norms"]

STEP_BITS = 4  # steps are taken at this width, as the penalty takes them


@dataclass(frozen=True)
class Norms:
    """Norms of the gradient of the loss, each summed over the tensors of its kind.

    Attributes:
        epoch: when, in epochs.
        loss: on the images it was measured with.
        l1_w: l1 norms of the weights' gradients.
        l2_w: l2 norms.
        l1_a: l1 norms of the activations' gradients.
        l2_a: l2 norms.
        step_l1_w: l1 norms, each times the step of its weight at 4 bits.
        step_l1_a: the same for the activations.
    """

    epoch: float
    loss: float
    l1_w: float
    l2_w: float
    l1_a: float
    l2_a: float
    step_l1_w: float
    step_l1_a: float


@dataclass(frozen=True)
class Change:
    """The change of the loss when weights move.

    Attributes:
        kind: ``"sign"`` for the move along the sign of the gradient, the worst to first order;
            ``"quantized"`` for that to the nearest code of a width.
        size: of the largest move of each tensor, in half steps at 4 bits.
        predicted: to first order, the worst that a move of this size can do.
        measured: what it did.
    """

    kind: str
    size: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Alone:
    """The loss when one tensor alone is quantized.

    Attributes:
        tensor: its name.
        bits: its width.
        rise: of the loss.
        accuracy: in percent.
    """

    tensor: str
    bits: int
    rise: float
    accuracy: float


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def norms(model: nn.Module, batch: Batch, epoch: float) -> Norms:
    """Return the norms of the gradient of the mean loss, in evaluation mode; nothing is changed."""
    quantizers, layers = named_quantizers(model), named_layers(model)
    with _evaluated(model), parametrize.cached(), seen_at_sites(model) as activations:
        loss = _loss(model, batch)
        weights = [layer.weight for layer in layers.values()]
    tensors = [*weights, *(tensor for _, tensor in activations)]
    grads = torch.autograd.grad(loss, tensors)
    steps = [
        layer.weight_quantizer.step(weight, STEP_BITS).detach()
        for layer, weight in zip(layers.values(), weights, strict=True)
    ]
    steps += [quantizers[name].step(tensor.detach(), STEP_BITS) for name, tensor in activations]
    sums = torch.stack(
        [
            torch.stack((g.abs().sum(), torch.linalg.vector_norm(g), (step * g).abs().sum()))
            for g, step in zip(grads, steps, strict=True)
        ]
    )
    l1_w, l2_w, step_w = sums[: len(weights)].sum(0).tolist()
    l1_a, l2_a, step_a = sums[len(weights) :].sum(0).tolist()
    return Norms(epoch, float(loss.detach()), l1_w, l2_w, l1_a, l2_a, step_w, step_a)


def changes(model: nn.Module, batch: Batch, widths: tuple[int, ...] = (8, 7, 6, 5, 4, 3)) -> list[Change]:
    """Move all weights at once, along the sign of their gradient and to their codes; measure the loss."""
    with _evaluated(model):
        loss = _loss(model, batch)
        weights = trainable_weights(model)
        grads = torch.autograd.grad(loss, list(weights.values()))
        before = float(loss.detach())
        half = {
            f"{name}.weight": layer.weight_quantizer.step(layer.weight, STEP_BITS).detach() / 2
            for name, layer in named_layers(model).items()
        }
        moves = [(w, half[name], g) for (name, w), g in zip(weights.items(), grads, strict=True)]
        slope = float(sum((unit * g).abs().sum() for _, unit, g in moves))
        found = [
            Change("sign", size, size * slope, _moved_loss(model, batch, moves, size) - before)
            for size in (2.0**power for power in range(-6, 3))
        ]
        for width in widths:
            with bits(model, w=width, a=None):
                rise = _value(model, batch) - before
            size = (2 ** (STEP_BITS - 1) - 1) / (2 ** (width - 1) - 1)
            found.append(Change("quantized", size, size * slope, rise))
    return found


def alone(model: nn.Module, batch: Batch, width: int) -> list[Alone]:
    """Quantize one tensor at a time, the images to 8 bits at least; the model must have its ranges."""
    found = []
    quantizers: dict[str, tuple[WeightQuantizer | ActivationQuantizer, int | None]] = {
        f"{name}.weight": (layer.weight_quantizer, width) for name, layer in named_layers(model).items()
    }
    quantizers |= {name: (q, width_at(q, width, INPUT_BITS)) for name, q in named_quantizers(model).items()}
    with _evaluated(model), torch.no_grad():
        before = _value(model, batch)
        for name, (quantizer, own) in quantizers.items():
            quantizer.bits = own
            try:
                logits = _logits(model, batch)
            finally:
                quantizer.bits = None
            rise = float(F.cross_entropy(logits, batch[1])) - before
            right = (logits.argmax(1) == batch[1]).float().mean()
            found.append(Alone(name, own or width, rise, 100 * float(right)))
    return found


def _moved_loss(
    model: nn.Module, batch: Batch, moves: list[tuple[Tensor, Tensor, Tensor]], size: float
) -> float:
    with contextlib.ExitStack() as stack:
        for weight, unit, grad in moves:
            stack.enter_context(shifted(weight, size * unit * grad.sign()))
        return _value(model, batch)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0].contiguous(memory_format=torch.channels_last))


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(_logits(model, batch), batch[1])


def _value(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return float(_loss(model, batch))
