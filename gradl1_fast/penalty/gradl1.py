"""The gradient-l1 regulariser, by exact double backprop or by a finite difference."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradl1_fast import _checks as check
from gradl1_fast._shown import html
from gradl1_fast.functional import l1_norm
from gradl1_fast.nn.arming import Arming, armings_of, requesting
from gradl1_fast.nn.convertible import warn_of_added_layers
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.ops import second_derivatives
from gradl1_fast.penalty.checks.custom_functions import gradients
from gradl1_fast.penalty.checks.distributed import is_distributed, refuse_shards
from gradl1_fast.penalty.checks.forward_pass import check_forward_pass, require_some
from gradl1_fast.penalty.checks.graph import freed_graph_explained
from gradl1_fast.penalty.checks.settings import check_loss, check_model, refuse_for_finite_difference
from gradl1_fast.penalty.display import largest_terms, summary
from gradl1_fast.penalty.finite_difference import add_gradients, autocast_refused, measured_by
from gradl1_fast.penalty.measured import Site, WeightTerm, sites_of, weight_terms
from gradl1_fast.penalty.share import Share
from gradl1_fast.penalty.weight_steps import can_be_together, weight_steps

__all__ = ["GradL1"]

SCALES = ("none", "step")
METHODS = ("exact", "finite_difference")
_numbers = itertools.count()


class GradL1:
    """The penalty ``lambda_w * sum_l ||dL/dW_l||_1 + lambda_a * sum_l ||dL/dY_l||_1``.

    W_l are the weights of the quantizable layers that require a gradient, as their forward pass uses them.
    Y_l are the inputs of the layers, except the input of the network, each counted once, and dL/dY_l is the
    gradient from these layers. Both are taken at the current width. Create the penalty before the forward
    pass, which it arms, and create it again after adding layers to the model and converting it again; a
    warning names layers that were added and not converted. A layer that a step does not use contributes
    zero. The loss should be the mean over the mini-batch.

    The penalty is 1-homogeneous in the loss: with a ``GradScaler``, pass the scaled loss. Sums of gradients
    use at least float32, and the first backward pass runs outside autocast.

    Args:
        model: a converted model, or one that contains layers of this library.
        lambda_w: coefficient of the weights' term, 0 or more; 0 disables the term at no cost.
        lambda_a: coefficient of the activations' term, 0 or more; 0 disables the term at no cost.
        scale: ``"step"`` multiplies each norm by the quantization step of its tensor at ``step_bits``, for
            its range in this batch before quantization. The gradient flows through the step too, so ranges
            shrink as well. Half of ``step * norm`` is the largest first-order change of the loss at that
            width, so one coefficient suits every layer. ``"none"`` uses only the norm, as in the paper; the
            same lambda is then several times as strong.
        every: apply the penalty every ``every`` calls, multiplied by ``every``; other calls return 0 and
            use an ordinary forward pass.
        share: the initial penalty as a share of the loss, such as 0.25, instead of the two coefficients.
            Each term gets half of it. The coefficients are measured on the first 8 calls that apply the
            penalty, and then fixed.
        method: ``"exact"``, or ``"finite_difference"`` for the approximation of :meth:`backward`.
        step_bits: the width at which ``scale="step"`` measures steps.
        epsilon: size of the finite difference, in units of the weights and activations; a smaller value is
            not always better, see :meth:`backward`.

    Raises:
        TypeError: an argument has the wrong type, or neither coefficients nor a share are given.
        ValueError: an argument is out of range, the model has nothing to penalise, or both coefficients and a
            share are given.

    Attributes:
        terms: after a call, the norm (times the step, with ``scale="step"``) of each weight and
            activation by name, detached; a call that ``every`` skips does not change it.
        value: after a call, the penalty, detached, None before; a call that ``every`` skips does not change
            it. A console shows it with the settings, a notebook with the largest terms.
        enabled: set it to False or True between steps to switch the penalty off or on.
        lambda_w: may be changed between calls.
        lambda_a: may be changed between calls; a change from or to 0 under ``torch.compile`` compiles again.

    Differentiable once. Source: section 3 of arXiv 2002.07520.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)]
        >>> model = gl.convert(torch.nn.Sequential(*layers))
        >>> penalty = gl.GradL1(model, lambda_w=0.01, lambda_a=0.01)
        >>> loss = model(torch.randn(16, 4)).square().mean()
        >>> (loss + penalty(loss)).backward()  # and a step of the optimizer
        >>> sorted(penalty.terms)
        ['0.weight', '2.input', '2.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        lambda_w: float | None = None,
        lambda_a: float | None = None,
        scale: str = "step",
        every: int = 1,
        *,
        share: float | None = None,
        method: str = "exact",
        step_bits: int = 4,
        epsilon: float = 1e-3,
    ) -> None:
        self.scale = check.one_of("GradL1: scale", scale, SCALES)
        self.method = check.one_of("GradL1: method", method, METHODS)
        self.every = check.count("GradL1: every", every)
        check.bits(step_bits, "GradL1: step_bits")
        self.step_bits = step_bits
        self.epsilon = check.coefficient("GradL1: epsilon", epsilon)
        if not self.epsilon:
            raise ValueError("GradL1: epsilon must be more than 0")
        self.share = _share(share, lambda_w, lambda_a, method)
        self.model = model
        self.layers = named_layers(model)
        self._sites = sites_of(model)
        self.terms: dict[str, Tensor] = {}
        self.value: Tensor | None = None
        self._calls = 0
        self._enabled = True
        self._number = next(_numbers)
        self._armings = list(armings_of(model.modules()))
        self._lambda_w, self._lambda_a = _coefficients(self.share, lambda_w, lambda_a, self.sites)
        check_model(self)
        warn_of_added_layers("GradL1", model)
        self._start()

    def __repr__(self) -> str:
        """Return the settings and the last value."""
        return summary(self)

    def _repr_html_(self) -> str:
        """Return the settings and the largest terms of the last call, for notebooks."""
        return html([summary(self), *largest_terms(self)])

    @property
    def lambda_w(self) -> float:
        """Coefficient of the weights' term."""
        return self._lambda_w

    @lambda_w.setter
    def lambda_w(self, value: float) -> None:
        self._lambda_w = check.coefficient("GradL1: lambda_w", value)
        self._arm()

    @property
    def lambda_a(self) -> float:
        """Coefficient of the activations' term; above 0, the next forward pass measures them."""
        return self._lambda_a

    @lambda_a.setter
    def lambda_a(self, value: float) -> None:
        self._lambda_a = check.coefficient("GradL1: lambda_a", value)
        self._measure()
        self._arm()

    @property
    def sites(self) -> list[Site]:
        """The sites that have a term. A forward pass may remove a site that gets the network's input."""
        return [site for site in self._sites if not site.quantizer.is_input]

    @property
    def enabled(self) -> bool:
        """Whether calls compute the penalty. If False, they return 0 and steps are ordinary."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        self._arm()

    def __call__(self, loss: Tensor) -> Tensor:
        """Return the penalty, a scalar to add to the loss and differentiate with it.

        Args:
            loss: a single value with its graph, from a forward pass of the model. A NaN or infinite loss
                gives a NaN or infinite penalty without an error, to avoid synchronizing with the device.

        Raises:
            RuntimeError: the loss has no graph or a freed one, gradients are disabled, no measured tensor got
                a gradient, the penalty would not depend on the parameters, a custom function in the graph
                would lose the penalty's gradient, a penalised weight was quantized to 1 bit or in a stored
                range (which clamps), or activations were measured for a penalty with a different scale.
            TypeError: the loss is not a tensor.
            ValueError: the loss has more than one value, or the method is the finite difference, which
                needs a closure, see :meth:`backward`.

        Calling it twice for one loss gives the same value. With ``every`` above 1 each call counts, so one
        of the two may return 0. Source: section 3 of arXiv 2002.07520.
        """
        if self.method != "exact":
            raise ValueError("GradL1: with method='finite_difference' call penalty.backward(closure) instead")
        check_loss(loss)
        if not self._is_due():
            self._arm()
            return loss.new_zeros(())
        weights = weight_terms(self.layers) if self.lambda_w else []
        sites = self.sites if self.lambda_a else []
        functions = check_forward_pass(self, loss, weights, sites)
        grads = self._differentiate(loss, weights, sites, functions)
        penalty = self._combine(loss, weights, grads[: len(weights)], sites, grads[len(weights) :])
        self.value = penalty.detach()
        self._arm()
        return penalty

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Add the gradient of loss plus penalty to each parameter's ``grad``; return the detached loss.

        With ``method="finite_difference"`` the penalty's gradient ``H sign(g)`` is approximated by
        ``(grad L(W + e s_W, Y + e s_Y) - grad L) / e`` with ``s = sign(g)``, which takes two ordinary steps.
        In a smooth network the error falls with ``epsilon`` until rounding dominates. With kinks, such as
        those of ReLU, each kink that a move crosses adds a jump of the gradient divided by ``epsilon``. The
        result may then have another direction, and a smaller ``epsilon`` can be worse.
        With ``method="exact"`` this is ``(loss + penalty(loss)).backward()``.

        Args:
            closure: computes the forward pass and returns the loss. It is called twice with the same random
                numbers from torch's default generators (CPU and CUDA only). Buffers, such as batch-norm
                statistics, keep the values of the first call.

        Raises:
            RuntimeError: no measured tensor got a gradient, the two calls used different parameters,
                activations are recomputed (checkpointing), the model is wrapped for distributed training,
                or it is quantized or of low precision (by type or autocast), so that small moves would be
                rounded.
        """
        if self.method == "exact":
            loss = closure()
            (loss + self(loss)).backward()
            return loss.detach()
        if not self._is_due() or not (self.lambda_w or self.lambda_a):
            return _plain_backward(closure)
        refuse_for_finite_difference(self)
        with autocast_refused(self.layers):
            measured = measured_by(self.layers, self.sites, self.lambda_w, self.lambda_a, self._step_bits)
            loss, self.terms = add_gradients(self.model, measured, closure, self.epsilon, self.every)
        coefficients = {item.name: item.coefficient for item in measured}
        parts = [(coefficients[name] * term).to(loss.device) for name, term in self.terms.items()]
        self.value = self.every * torch.stack(parts).sum()
        return loss

    @property
    def _step_bits(self) -> int | None:
        return self.step_bits if self.scale == "step" else None

    def _is_due(self) -> bool:
        """Count a call; return whether the penalty applies to it."""
        if not self._enabled:
            return False
        self._calls += self.every > 1
        return self._calls % self.every == 0 and bool(self.lambda_w or self.lambda_a)

    def _start(self) -> None:
        """Install plans and arm the model; the model is disarmed when the penalty is garbage-collected."""
        if self.method != "exact":
            return
        second_derivatives.install()
        for arming in self._armings:
            if arming.planner is not None:
                arming.planner(self.model)
        for site in self._sites:
            site.quantizer.step_bits = self._step_bits
        weakref.finalize(self, _disarm, self._number, self._armings, self._sites)
        self._measure()
        self._arm()

    def _measure(self) -> None:
        """Make sites measure in armed passes if activations have a coefficient."""
        if self.method == "exact":
            for site in self._sites:
                site.quantizer.measure_for(self._number, bool(self.lambda_a))

    def _arm(self) -> None:
        """Arm the model and its sites if the next call applies the penalty; disarm them otherwise."""
        if torch.compiler.is_compiling() or self.method != "exact":
            return
        due = self._enabled and (self._calls + 1) % self.every == 0
        armed, measuring = due and bool(self.lambda_w or self.lambda_a), due and bool(self.lambda_a)
        for arming in self._armings:
            arming.set(self._number, armed, measuring)
            arming.has_run = False

    def _differentiate(
        self, loss: Tensor, weights: Sequence[WeightTerm], sites: Sequence[Site], functions: list[Any]
    ) -> list[Tensor | None]:
        """Return the gradient of each weight and the norm at each site; None for unused weights and sites."""
        inputs = [term.tensor for term in weights] + [site.probe for site in sites]
        if not inputs:
            raise RuntimeError("GradL1: every weight is frozen and no activation is penalised")
        requested = "weights" if weights else "activations"
        with freed_graph_explained(), _no_autocast(loss.device.type), requesting(self._armings, requested):
            grads = list(gradients(loss, inputs, functions))
        if not torch.compiler.is_compiling():
            if is_distributed():
                refuse_shards(self.model.named_parameters())
            refuse_shards((term.name, term.tensor) for term in weights)
        require_some(weights, grads[: len(weights)], "weight")
        if not any(
            arming.has_run for arming in self._armings
        ):  # a step may have used no penalised activation
            require_some(sites, grads[len(weights) :], "activation")
        if not any(grad is not None and grad.requires_grad for grad in grads):
            raise RuntimeError("GradL1: the penalty is constant: no gradient depends on a parameter")
        return grads

    def _combine(
        self,
        loss: Tensor,
        weights: Sequence[WeightTerm],
        weight_grads: Sequence[Tensor | None],
        sites: Sequence[Site],
        activation_terms: Sequence[Tensor | None],
    ) -> Tensor:
        if any(norm is None for norm in activation_terms):  # layers may have joined another site
            self._sites = sites_of(self.model)
        current_sites = self.sites if sites else []
        self.terms = dict.fromkeys(_names(weights, current_sites), loss.new_zeros(()))
        of_weights = self._norms_of_weights(weights, weight_grads)
        of_sites = self._norms_at_sites(sites, activation_terms)
        if self.share is not None and not self.share.is_fixed:
            self._lambda_w, self._lambda_a = self.share.take(loss, of_weights, of_sites)
        parts = [
            coefficient * norm
            for coefficient, norm in ((self.lambda_w, of_weights), (self.lambda_a, of_sites))
            if norm is not None
        ]
        return self.every * (parts[0] if len(parts) == 1 else parts[0] + parts[1])

    def _norms_of_weights(self, terms: Sequence[WeightTerm], grads: Sequence[Tensor | None]) -> Tensor | None:
        pairs = [(term, grad) for term, grad in zip(terms, grads, strict=True) if grad is not None]
        if not pairs:
            return None
        norms = self._weighted_norms([term for term, _ in pairs], [grad for _, grad in pairs])
        by_name: dict[str, Tensor] = {}
        for (term, _), norm in zip(pairs, norms.detach().unbind(), strict=True):
            by_name[term.name] = by_name[term.name] + norm if term.name in by_name else norm
        self.terms |= by_name
        return norms.sum()

    def _weighted_norms(self, terms: list[WeightTerm], grads: list[Tensor]) -> Tensor:
        """Return the norm of each gradient, multiplied by the step of its weight with ``scale="step"``."""
        if self.scale == "none" or not can_be_together(terms):
            return l1_norm([self._by_step(term, grad) for term, grad in zip(terms, grads, strict=True)])
        return l1_norm(grads) * weight_steps([term.tensor for term in terms], grads, self.step_bits)

    def _by_step(self, term: WeightTerm, grad: Tensor) -> Tensor:
        """Return the gradient of a weight, multiplied by the weight's step with ``scale="step"``."""
        if self.scale == "none":
            return grad
        return term.layer.weight_quantizer.step(term.tensor, self.step_bits) * grad

    def _norms_at_sites(self, sites: Sequence[Site], norms: Sequence[Tensor | None]) -> Tensor | None:
        pairs = [(site, norm) for site, norm in zip(sites, norms, strict=True) if norm is not None]
        if not pairs:
            return None
        for site, norm in pairs:
            self.terms[site.name] = norm.detach()
        return torch.stack([norm.to(pairs[0][1].device) for _, norm in pairs]).sum()


def _share(share: float | None, lambda_w: float | None, lambda_a: float | None, method: str) -> Share | None:
    if share is None:
        if lambda_w is None or lambda_a is None:
            raise TypeError("GradL1: give both lambda_w and lambda_a, or share (such as share=0.25)")
        return None
    if lambda_w is not None or lambda_a is not None:
        raise ValueError("GradL1: give lambda_w and lambda_a, or share, not both: share derives the lambdas")
    if not check.coefficient("GradL1: share", share):
        raise ValueError("GradL1: share must be more than 0")
    if method != "exact":
        raise ValueError("GradL1: share needs method='exact'")
    return Share(share)


def _coefficients(
    share: Share | None, lambda_w: float | None, lambda_a: float | None, sites: Sequence[Site]
) -> tuple[float, float]:
    if share is not None:  # any value but 0 until the first batch
        return 1.0, 1.0 if sites else 0.0
    return check.coefficient("GradL1: lambda_w", lambda_w), check.coefficient("GradL1: lambda_a", lambda_a)


def _names(weights: Sequence[WeightTerm], sites: Sequence[Site]) -> list[str]:
    return [term.name for term in weights] + [site.name for site in sites]


def _disarm(number: int, armings: Sequence[Arming], sites: Sequence[Site]) -> None:
    for arming in armings:
        arming.set(number, False, False)
    for site in sites:
        site.quantizer.measure_for(number, False)


def _plain_backward(closure: Callable[[], Tensor]) -> Tensor:
    loss = closure()
    loss.backward()
    return loss.detach()


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if check.autocast_is_on(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
