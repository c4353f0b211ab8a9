"""The regulariser: gradient-l1 penalty by exact double backprop, or by a finite difference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast.penalty.checks.custom_functions import gradients, refuse_once_differentiable
from gradl1_fast.penalty.checks.distributed import refuse_shards, refuse_wrappers
from gradl1_fast.penalty.finite_difference import Measured, add_gradients, autocast_refused
from gradl1_fast.functional import l1_norm
from gradl1_fast.penalty.checks.graph import (
    OTHER_SCALE,
    look,
    refuse_clamped,
    refuse_cut_region,
    refuse_other_scale,
    refuse_width,
    require_gradients,
)
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.sites import Site, activation_sites, named_layers

__all__ = ["GradL1"]

SCALES = ("none", "step")
METHODS = ("exact", "finite_difference")


class GradL1:
    """The penalty ``lambda_w * sum_l ||dL/dW_l||_1 + lambda_a * sum_l ||dL/dY_l||_1``.

    W_l are the weights of the quantizable layers that require a gradient, Y_l the activations
    behind quantizers, both as they are at the present width; dL/dW_l is the whole gradient of a
    weight that several layers share. Make the penalty before the forward pass, since activations are
    measured only once one asks for it, and again when layers were added to the model. The loss is
    meant to be the mean over the mini-batch.

    The penalty is 1-homogeneous in the loss: with a ``GradScaler`` pass it the scaled loss. Gradient
    sums are float32 at least, and the first backward runs outside autocast.

    Args:
        model: a converted model, or one that contains layers of this library.
        lambda_w: coefficient of the weights' term, 0 or more; 0 costs nothing.
        lambda_a: coefficient of the activations' term, likewise.
        scale: ``"none"``, or ``"step"`` to multiply each norm by the quantization step of its
            tensor at ``step_bits``, for its range in this batch, before quantization; the gradient
            flows through the step too, so that ranges shrink as well. Half of ``step * norm`` is the
            worst first-order change of the loss at that width.
        every: apply the penalty on each ``every``-th call only, multiplied by ``every``; other
            calls return 0 at no cost (with ``scale="step"`` the ranges are still measured).
        method: ``"exact"``, or ``"finite_difference"`` for the approximation of :meth:`backward`.
        step_bits: the width at which ``scale="step"`` measures steps.
        epsilon: size of the finite difference, in units of the weights and activations; smaller is
            not always better, see :meth:`backward`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, the model has nothing to penalise, or it has a
            weight that is no parameter (recomputed by a hook).

    Attributes:
        terms: after a call, the norm (times the step, with ``scale="step"``) of each weight and
            activation by name, detached; a call that ``every`` skips leaves it as it was.
        lambda_w: may be changed between calls.
        lambda_a: likewise, except from or to 0 under ``torch.compile``, which compiles again.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)]
        >>> model = gl.convert(torch.nn.Sequential(*layers))
        >>> penalty = gl.GradL1(model, lambda_w=0.01, lambda_a=0.01, scale="step")
        >>> loss = model(torch.randn(16, 4)).square().mean()
        >>> (loss + penalty(loss)).backward()  # and a step of the optimizer
        >>> sorted(penalty.terms)
        ['0.weight', '2.weight', 'activation_quantizers._1']
    """

    def __init__(
        self,
        model: nn.Module,
        lambda_w: float,
        lambda_a: float,
        scale: str = "none",
        every: int = 1,
        *,
        method: str = "exact",
        step_bits: int = 4,
        epsilon: float = 1e-3,
    ) -> None:
        self.scale, self.method = (
            check.one_of("GradL1: scale", scale, SCALES),
            check.one_of("GradL1: method", method, METHODS),
        )
        self.every = check.count("GradL1: every", every)
        check.bits(step_bits, "GradL1: step_bits")
        self.step_bits = step_bits
        self.epsilon = check.coefficient("GradL1: epsilon", epsilon)
        if not self.epsilon:
            raise ValueError("GradL1: epsilon must be more than 0")
        self.model = model
        self.layers = named_layers(model)
        self.sites = activation_sites(model)
        self.lambda_w, self.lambda_a = lambda_w, lambda_a
        self.terms: dict[str, Tensor] = {}
        self._calls = 0
        _check_model(self)
        self._set_step_bits()

    @property
    def lambda_w(self) -> float:
        """Coefficient of the weights' term."""
        return self._lambda_w

    @lambda_w.setter
    def lambda_w(self, value: float) -> None:
        self._lambda_w = check.coefficient("GradL1: lambda_w", value)

    @property
    def lambda_a(self) -> float:
        """Coefficient of the activations' term; above 0, the next forward pass measures them."""
        return self._lambda_a

    @lambda_a.setter
    def lambda_a(self, value: float) -> None:
        self._lambda_a = check.coefficient("GradL1: lambda_a", value)
        if self._lambda_a and self.method == "exact":
            for site in self.sites:
                site.probe.requires_grad_(True)

    def __call__(self, loss: Tensor) -> Tensor:
        """Return the penalty, a scalar to be added to the loss and differentiated with it.

        Args:
            loss: a single value with its graph, from a forward pass of the model. A NaN or infinite
                loss gives a NaN or infinite penalty: nothing here waits for the device to look.

        Raises:
            RuntimeError: the loss has no graph, gradients are disabled, something measured got no
                gradient, the penalty would not depend on the parameters, a custom function in the graph
                would lose the penalty's gradient, or in the forward pass a penalised weight was quantized
                to 1 bit or in a stored range, which clamps, or activations were measured for another
                penalty with a different scale.
            TypeError: the loss is not a tensor.
            ValueError: the loss has more than one value, or the method is the finite difference,
                which takes a closure: see :meth:`backward`.

        It may be called twice for one loss and gives the same value; with ``every`` above 1 each call
        counts, and one of both may return 0. Source: section 3 of arXiv 2002.07520.
        """
        if self.method != "exact":
            raise ValueError("GradL1: with method='finite_difference' call penalty.backward(closure) instead")
        _check_loss(loss)
        if not self._is_due() or not (self.lambda_w or self.lambda_a):
            return loss.new_zeros(())
        weights, sites = self._weights(), self.sites if self.lambda_a else []
        functions = self._check_graph(loss, weights, sites)
        grads = self._gradients(loss, weights, sites, functions)
        return self.every * self._combine(weights, grads[: len(weights)], sites, grads[len(weights) :])

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Add the gradient of loss plus penalty to each parameter's ``grad``; return the loss, detached.

        With ``method="finite_difference"`` the penalty's gradient ``H sign(g)`` is approximated by
        ``(grad L(W + e s_W, Y + e s_Y) - grad L) / e`` with ``s = sign(g)``: two ordinary steps. In a
        smooth network its error falls with ``epsilon`` until rounding takes over. In one with kinks, as
        those of ReLU, a move that crosses some adds a jump of the gradient divided by ``epsilon``: the
        result may point elsewhere, and a smaller ``epsilon`` can be worse, as long as any is crossed.
        With ``method="exact"`` this is ``(loss + penalty(loss)).backward()``.

        Args:
            closure: computes the forward pass and returns the loss; it is called twice, with the
                same numbers from torch's default generators (CPU and CUDA; no others), and the
                buffers (batch-norm statistics) keep what the first call left.

        Raises:
            RuntimeError: something measured got no gradient, the two calls used different
                parameters, activations are computed again (checkpointing), the model is quantized or of
                low precision, by its type or autocast, where a small move is rounded away or becomes a
                whole step, or it is wrapped for distributed training.
        """
        if self.method == "exact":
            loss = closure()
            (loss + self(loss)).backward()
            return loss.detach()
        if not self._is_due() or not (self.lambda_w or self.lambda_a):
            return _plain_backward(closure)
        _check_finite_difference(self)
        computed: dict[str, tuple[nn.Module, Tensor]] = {
            name: (layer, layer.weight) for name, layer in self.layers.items()
        }
        computed |= {s.name: (s.producer, s.probe) for s in self.sites} if self.lambda_a else {}
        with autocast_refused(computed):
            loss, self.terms = add_gradients(self.model, self._measured(), closure, self.epsilon, self.every)
        return loss

    def _measured(self) -> list[Measured]:
        step = self.scale == "step"
        weights = [
            Measured(
                _weight_of(name),
                layer.weight,
                self.lambda_w,
                partial(layer.weight_quantizer.step, bits=self.step_bits) if step else None,
            )
            for name, layer in self._weights().items()
        ]
        activations = [
            Measured(
                site.name,
                site.producer,
                self.lambda_a,
                partial(site.quantizer.step, bits=self.step_bits) if step else None,
            )
            for site in (self.sites if self.lambda_a else [])
        ]
        return weights + activations

    def _is_due(self) -> bool:
        if self.every == 1:
            return True
        self._calls += 1
        return self._calls % self.every == 0

    def _weights(self) -> dict[str, QuantizedLayer]:
        """Return the layers whose weights are penalised, one for each distinct parameter."""
        if not self.lambda_w:
            return {}
        _check_parameters(self.layers)  # once more: a model may be parametrized later
        distinct = {id(layer.weight): name for name, layer in reversed(self.layers.items())}
        return {
            name: layer
            for name, layer in self.layers.items()
            if layer.weight.requires_grad and distinct[id(layer.weight)] == name
        }

    def _gradients(
        self, loss: Tensor, layers: dict[str, QuantizedLayer], sites: list[Site], functions: list[Any]
    ) -> list[Tensor]:
        inputs = [layer.weight for layer in layers.values()] + [site.probe for site in sites]
        if not inputs:
            raise RuntimeError("GradL1: every weight is frozen and no activation is penalised")
        with _no_autocast(loss.device.type):
            grads = gradients(loss, inputs, functions)
        if not torch.compiler.is_compiling():
            refuse_shards(self.model.named_parameters())
        names = [_weight_of(name) for name in layers] + [site.name for site in sites]
        found = require_gradients(names, grads)
        if not any(grad.requires_grad for grad in found):
            raise RuntimeError("GradL1: the penalty is constant: no gradient depends on a parameter")
        return found

    def _combine(
        self,
        layers: dict[str, QuantizedLayer],
        weight_grads: list[Tensor],
        sites: list[Site],
        activation_terms: list[Tensor],
    ) -> Tensor:
        parts = []
        self.terms = {}
        if layers:
            norms = l1_norm(self._by_step(layers, weight_grads))
            self.terms = {_weight_of(n): v for n, v in zip(layers, norms.detach(), strict=True)}
            parts.append(self.lambda_w * norms.sum())
        if sites:
            norms = torch.stack([term.to(activation_terms[0].device) for term in activation_terms])
            self.terms |= {s.name: v for s, v in zip(sites, norms.detach(), strict=True)}
            parts.append(self.lambda_a * norms.sum())
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _by_step(self, layers: dict[str, QuantizedLayer], grads: list[Tensor]) -> list[Tensor]:
        """Return the weights' gradients, multiplied by the steps of the weights if asked for."""
        if self.scale == "none":
            return grads
        steps = [layer.weight_quantizer.step(layer.weight, self.step_bits) for layer in layers.values()]
        return [step * grad for step, grad in zip(steps, grads, strict=True)]

    def _set_step_bits(self) -> None:
        for site in self.sites:
            site.quantizer.step_bits = self._site_step_bits()

    def _site_step_bits(self) -> int | None:
        return self.step_bits if self.scale == "step" and self.method == "exact" else None

    def _check_graph(self, loss: Tensor, layers: dict[str, QuantizedLayer], sites: list[Site]) -> list[Any]:
        """Look for what would make the penalty wrong in silence; return the custom functions of others.

        Widths and scales may be others by now than in the forward pass: the graph tells which it had.
        """
        if torch.compiler.is_compiling():
            self._check_modules(layers, sites)
            refuse_cut_region(loss)
            return []
        weights = {name: layer.weight for name, layer in layers.items()}
        graph = look(loss, weights | {site.name: site.probe for site in sites})
        refuse_once_differentiable(graph.functions)
        refuse_clamped(graph, weights)
        for site in sites:
            refuse_other_scale(graph, site.name, site.quantizer.step_bits, self._site_step_bits())
        refuse_shards((_weight_of(name), weight) for name, weight in weights.items())
        return graph.functions

    def _check_modules(self, layers: dict[str, QuantizedLayer], sites: list[Site]) -> None:
        """Look at widths and scales where the forward pass is compiled together with the penalty."""
        for name, layer in layers.items():
            quantizer = layer.weight_quantizer
            if quantizer.bits is not None and quantizer.clamps:
                refuse_width(name, quantizer.bits)
        for site in sites:
            if site.quantizer.step_bits != self._site_step_bits():
                raise RuntimeError(OTHER_SCALE.format(site.name))


def _weight_of(layer: str) -> str:
    return f"{layer}.weight" if layer else "weight"  # the model itself may be the layer


def _plain_backward(closure: Callable[[], Tensor]) -> Tensor:
    loss = closure()
    loss.backward()
    return loss.detach()


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if check.autocast_is_on(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _check_model(penalty: GradL1) -> None:
    refuse_wrappers(penalty.model)
    if penalty.lambda_w and not penalty.layers:
        raise ValueError("GradL1: the model has no quantizable layer; call gradl1_fast.convert first")
    if penalty.lambda_a and not penalty.sites:
        raise ValueError(
            "GradL1: lambda_a needs activation quantizers and the model has none that is penalised; "
            "call gradl1_fast.convert first, or set lambda_a=0"
        )
    _check_parameters(penalty.layers)


def _check_parameters(layers: dict[str, QuantizedLayer]) -> None:
    for name, layer in layers.items():
        if layer._parameters.get("weight") is None:  # functional_call may have put any tensor there
            raise ValueError(
                f"GradL1: {_weight_of(name)} is not a parameter (a hook or parametrization computes it)"
            )


def _check_finite_difference(penalty: GradL1) -> None:
    quantizers = (WeightQuantizer, ActivationQuantizer)
    modules = list(penalty.model.modules())
    if any(isinstance(m, quantizers) and m.bits is not None for m in modules):
        raise RuntimeError(
            "GradL1: the finite difference needs every width at float; see gradl1_fast.set_bits"
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in modules):
        raise RuntimeError("GradL1: the finite difference does not average over ranks; use method='exact'")
    narrow = {layer.weight.dtype for layer in penalty.layers.values()} - {torch.float32, torch.float64}
    if narrow:
        raise RuntimeError(f"GradL1: the finite difference needs weights of float32 or float64, not {narrow}")


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"GradL1: the loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"GradL1: the loss must be a single value, got shape {tuple(loss.shape)}")
    if not torch.is_grad_enabled():
        raise RuntimeError("GradL1: called with gradients disabled (no_grad or inference_mode)")
    if not loss.requires_grad:
        raise RuntimeError("GradL1: the loss has no graph; was it computed under no_grad or detached?")
