"""Runs containers by a plan that has been verified to compute the same outputs as their modules.

Plans use the attribute ``_compiled_call_impl`` of ``torch.nn.Module``, which ``Module.compile()`` uses too.
If set, it is called instead of ``_call_impl``. It belongs to the instance and is neither copied nor pickled,
so the class of a container, its ``forward`` and its hooks do not change. A penalty installs the plans of a
model when it arms the model.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.utils._pytree import tree_leaves

from gradl1_fast.conversion.execution import batch_norm_act
from gradl1_fast.conversion.regions.region import Region, executable
from gradl1_fast.conversion.snapshot import Snapshot, layers_in
from gradl1_fast.conversion.trace import is_leaf, trace
from gradl1_fast.conversion.unchanged import NotTraceableError
from gradl1_fast.conversion.verification import difference
from gradl1_fast.nn.arming import Arming, is_armed
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.sharing import mark_input

__all__ = ["containers", "install"]

_HOOKS = "has hooks inside"
_CHANGING = "what its code reads changed in each of several passes"
_MOST_CHANGES = 20  # in a row, each of which needs a new trace


def install(model: nn.Module) -> None:
    """Make the containers and batch norms of a model run plans while a penalty is armed."""
    arming = next((m.arming for m in model.modules() if isinstance(m, QuantizedLayer)), None)
    if arming is None:
        return
    for module in containers(model):
        current = module._compiled_call_impl
        if current is None or (isinstance(current, Planned) and current.module is not module):
            module._compiled_call_impl = Planned(module, arming)
    root = model._compiled_call_impl
    if isinstance(root, Planned):
        root.is_root = True


def containers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that may have a plan: containers of layers, and each ``nn.BatchNorm2d``."""
    for module in model.modules():
        runs = not is_leaf(module) and type(module).forward is not nn.Module.forward
        holds_layers = runs and any(isinstance(m, QuantizedLayer) for m in module.modules())
        if holds_layers or type(module) is nn.BatchNorm2d:
            yield module


class Planned:
    """Runs a container by its plan in an armed forward pass, and by its modules otherwise.

    Args:
        module: the container, held by a weak reference.
        arming: the arming state of the model.

    Attributes:
        is_root: whether the container's arguments are the input of the network.
        has_run: whether the container was called in an armed forward pass.
        reason: why the last armed forward pass ran the modules; empty if it ran the plan.
    """

    def __init__(self, module: nn.Module, arming: Arming) -> None:
        self._module = weakref.ref(module)
        self._arming = arming
        self.is_root = False
        self.has_run = False
        self.reason = ""
        self._plans: dict[bool, _Plan | str | None] = {}
        self._changes = 0

    @property
    def module(self) -> nn.Module | None:
        """The container."""
        return self._module()

    @property
    def regions(self) -> list[Region]:
        """The regions of the plan for the current mode."""
        module = self.module
        plan = None if module is None else self._plans.get(module.training)
        return plan.regions if isinstance(plan, _Plan) else []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the container with its arguments."""
        if torch.compiler.is_compiling():
            return self._module()._call_impl(*args, **kwargs)  # type: ignore[union-attr]
        # A replica of DataParallel copies this attribute, but is a different module.
        caller: Any = sys._getframe(1).f_locals.get("self")
        module = self._module()
        if module is None or caller is not module:
            return caller._call_impl(*args, **kwargs)
        if not is_armed(self._arming) or is_fx_symbolic_tracing():  # a container around it is being traced
            return module._call_impl(*args, **kwargs)
        if self.is_root:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    mark_input(value)
        run = self._runnable(module, args, kwargs)
        return module._call_impl(*args, **kwargs) if run is None else run(*args, **kwargs)

    def _runnable(self, module: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any] | None:
        self.has_run = True
        self.reason = _why_not_now(args, kwargs)
        if self.reason:
            return None
        plan = self._plans.get(module.training)
        if _is_observed(module, plan):
            self.reason = "was called while a tensor at a site is observed or replaced"
            return None
        if isinstance(plan, _Plan):
            if plan.snapshot.holds(module):
                self._changes = 0
            else:
                self._changes += 1
                plan = self._plans[module.training] = None if self._changes < _MOST_CHANGES else _CHANGING
        if plan is None or plan == _HOOKS:  # hooks may have been removed since; other reasons are permanent
            plan = self._plans[module.training] = _plan_of(module, self._arming)
        if isinstance(plan, str):
            self.reason = plan
            return None
        self.reason = plan.verify(module, args)
        return None if self.reason else plan.run


class _Plan:
    """A container's computation as one function, and the state for which it is valid.

    Attributes:
        snapshot: the state of the container.
        run: computes the container's result from its arguments.
        regions: the parts that run as one node of the autograd graph.
    """

    def __init__(self, snapshot: Snapshot, run: Callable[..., Any], regions: list[Region]) -> None:
        self.snapshot, self.run, self.regions = snapshot, run, regions
        self._verified: dict[tuple[Any, ...], str] = {}

    def verify(self, module: nn.Module, args: tuple[Any, ...]) -> str:
        """Return why the plan may not run; compare it with the modules on the first call of each kind."""
        kind = (
            tuple((x.dtype, x.dim(), x.device.type) for x in args),
            torch.is_autocast_enabled(args[0].device.type),
        )
        if kind not in self._verified:
            self._verified[kind] = difference(module, module._call_impl, self.run, args)
        return self._verified[kind]


def _is_observed(module: nn.Module, plan: _Plan | str | None) -> bool:
    """Return whether an observer or a replacement needs the tensors at a site, which a region does not show.

    A plan that is verified would show them twice.
    """
    if isinstance(plan, str) and plan != _HOOKS:
        return False  # the modules run anyway
    layers = plan.snapshot.layers if isinstance(plan, _Plan) else layers_in(module.modules())
    sites: Any = [layer._modules.get("input_quantizer") for layer in layers]
    return any(q is not None and (q.observer is not None or q.move is not None) for q in sites)


def _plan_of(module: nn.Module, arming: Arming) -> _Plan | str:
    snapshot = Snapshot(module)
    if snapshot.has_hooks:
        return _HOOKS
    if type(module) is nn.BatchNorm2d:
        return _Plan(snapshot, lambda x: batch_norm_act(module, x, None, "none", None), [])
    try:
        return _Plan(snapshot, *executable(module, trace(module).graph, arming))
    except NotTraceableError as reason:
        return str(reason)


def _why_not_now(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return why this call cannot run a plan, or an empty string."""
    if kwargs or not args or not all(isinstance(x, Tensor) for x in args):
        return "was called with arguments other than positional tensors"
    if (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return "was called in a functional transform or in forward-mode differentiation"
    if torch._C._get_tracing_state() is not None:
        return "was called during torch.jit tracing"
    hooks = nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks:
        return "was called while global module hooks are registered"
    return ""
