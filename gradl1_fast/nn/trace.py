"""The forward pass of a model as one graph, or the reason why it cannot be had."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

__all__ = ["IN_PLACE_OPERATORS", "NotTraceableError", "Tracer", "has_hooks", "trace"]

# What ``a += b`` and its relatives call, and the operation that leaves ``a`` as it was.
IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
}

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class NotTraceableError(Exception):
    """The model's forward pass cannot be taken as one graph; the message says why."""


def trace(tree: nn.Module) -> fx.Graph:
    """Return the graph of the forward pass, the same in training and in evaluation.

    Raises:
        NotTraceableError: a graph would not compute what the model computes.
    """
    _refuse_hooks(tree)
    modes = {module: module.training for module in tree.modules()}
    try:
        graphs = []
        for training in (True, False):
            for module in modes:
                module.training = training
            with torch.enable_grad():
                graphs.append(Tracer().trace(tree))
    except NotTraceableError:
        raise
    except Exception as error:  # the model's own code runs in here: it may raise anything
        raise NotTraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise NotTraceableError("its forward pass differs between training and evaluation")
    if any(node.target is operator.setitem for node in graphs[0].nodes):
        raise NotTraceableError("it assigns to parts of a tensor")
    for node in graphs[0].nodes:
        node.type = None  # an annotation, which pickle could not import where it is a string
    return graphs[0]


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything is called before or after the module's passes."""
    return any(table for key, table in vars(module).items() if key.endswith(_HOOKS))


class Tracer(fx.Tracer):
    """Records what a plain ``torch.fx.Tracer`` would lose without a word, or refuses it."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node, which sees in-place operators."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module stays whole; subclasses of layers do, so that they keep their names."""
        return isinstance(m, _LAYERS) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation, unless a mode is on that the graph would not have."""
        if not torch.is_grad_enabled():
            raise NotTraceableError("it switches gradients off for a part")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise NotTraceableError("autocast is on in it")
        return super().create_node(*args, **kwargs)


class _Proxy(fx.Proxy):
    """Records ``a += b`` as such; fx falls back to ``a + b``, and forgets that ``a`` itself changes."""


def _in_place(target: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _target in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_target.__name__}__", _in_place(_target))


def _refuse_hooks(tree: nn.Module) -> None:
    """Refuse hooks on the modules that tracing takes apart: they would run once, and never again."""
    tracer = Tracer()
    for name, module in tree.named_modules():
        if name and has_hooks(module) and not tracer.is_leaf_module(module, name):
            raise NotTraceableError(f"module {name!r} has hooks, which tracing would lose")
