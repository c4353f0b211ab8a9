"""The forward pass of a model as one graph, or the reason why it cannot be had."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from gradl1_fast.nn.unchanged import NotTraceableError, unchanged

__all__ = [
    "IN_PLACE_OPERATORS",
    "PLAIN_LAYERS",
    "NotTraceableError",
    "Tracer",
    "has_hooks",
    "has_own_forward",
    "trace",
]

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
PLAIN_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def trace(tree: nn.Module) -> fx.Graph:
    """Return the graph of the forward pass, the same whatever mode is on and whoever calls.

    Nothing of the model changes: a forward pass that would change a parameter, a buffer or an attribute of it
    is refused.

    Raises:
        NotTraceableError: a graph would not compute what the model computes.
    """
    _refuse_hooks(tree)
    _refuse_replaced(tree)
    _refuse_overrides(tree)
    try:
        graph = _record(tree)
        _refuse_another(graph, _record(tree, training=False), "between training and evaluation")
        _refuse_another(graph, _record(tree, gradients=False), "where gradients are switched off")
        _refuse_another_default(tree, graph)
    except NotTraceableError:
        raise
    except Exception as error:  # the model's own code runs in here: it may raise anything
        raise NotTraceableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if any(node.target is operator.setitem for node in graph.nodes):
        raise NotTraceableError("it assigns to parts of a tensor")
    for node in graph.nodes:
        node.type = None  # an annotation, which pickle could not import where it is a string
    return graph


def _record(
    tree: nn.Module, *, training: bool = True, gradients: bool = True, given: dict[str, Any] | None = None
) -> fx.Graph:
    modes = {module: module.training for module in tree.modules()}
    try:
        for module in modes:
            module.training = training
        with torch.set_grad_enabled(gradients), unchanged(tree):
            return Tracer(gradients).trace(tree, given)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _refuse_another(graph: fx.Graph, other: fx.Graph, when: str) -> None:
    if str(graph) != str(other):
        raise NotTraceableError(f"its forward pass differs {when}")


def _refuse_another_default(tree: nn.Module, graph: fx.Graph) -> None:
    """Refuse a forward pass in which an argument that is not given changes what is called.

    While it is recorded, no argument is None, or anything else that a branch may ask for.
    """
    parameters = inspect.signature(type(tree).forward).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    if not defaults:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fx has no assertion for some types
            other = _record(tree, given=defaults)
    except (NotTraceableError, fx.proxy.TraceError):
        raise
    except Exception:  # without that argument the model itself fails
        return
    given = parameters.keys() - defaults
    if _calls(graph, given) != _calls(other, given):
        raise NotTraceableError(f"what it computes depends on which of {', '.join(defaults)} are given")


def _calls(graph: fx.Graph, given: Collection[str]) -> list[tuple[str, Any]]:
    """Return what a graph calls, but for what depends on nothing but arguments that are not given."""
    found, calls = set(), []
    for node in graph.nodes:
        if node.op == "placeholder":
            depends = str(node.target).lstrip("*") in given
        else:
            depends = node.op in ("get_attr", "call_module") or any(n in found for n in node.all_input_nodes)
        if depends:
            found.add(node)
            calls.append((node.op, node.target))
    return calls


def has_hooks(module: nn.Module) -> bool:
    """Return whether anything is called before or after the module's passes."""
    return any(table for key, table in vars(module).items() if key.endswith(_HOOKS))


def has_own_forward(module: nn.Module) -> bool:
    """Return whether somebody replaced the ``forward`` of this very module; its class says nothing then."""
    return "forward" in vars(module)


class Tracer(fx.Tracer):
    """Records what a plain ``torch.fx.Tracer`` would lose without a word, or refuses it.

    Args:
        gradients: whether they are on while it records; a part in which they are not is refused.
    """

    def __init__(self, gradients: bool = True) -> None:
        super().__init__()
        self._gradients = gradients

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node, which sees in-place operators."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module stays whole; subclasses of layers do, so that they keep their names."""
        return isinstance(m, PLAIN_LAYERS) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation, unless a mode is on that the graph would not have."""
        if torch.is_grad_enabled() != self._gradients:
            raise NotTraceableError(f"it switches gradients {'off' if self._gradients else 'on'} for a part")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise NotTraceableError("autocast is on in it")
        return super().create_node(*args, **kwargs)


class _Proxy(fx.Proxy):
    """Records ``a += b`` as such; fx falls back to ``a + b``, and forgets that ``a`` itself changes.

    Neither does it record ``a.data = b``, which is refused.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise NotTraceableError(f"it assigns to the {name} of a tensor")
        super().__setattr__(name, value)


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


def _refuse_replaced(tree: nn.Module) -> None:
    for name, module in tree.named_modules():
        if has_own_forward(module):
            raise NotTraceableError(f"the forward() of {name or 'the model'} was replaced")


def _refuse_overrides(tree: nn.Module) -> None:
    """Refuse methods that replace those of ``nn.Module``: the graph is of another class, without them."""
    cls = type(tree)
    for name, method in vars(nn.Module).items():
        own = getattr(cls, name, None)
        said = name in ("forward", "extra_repr") or (name.startswith("__") and name != "__call__")
        if inspect.isfunction(method) and own is not method and not said and not _is_of_torch(own):
            raise NotTraceableError(f"it has a {name}() of its own, which a graph would not have")


def _is_of_torch(method: object) -> bool:
    return getattr(method, "__module__", "").partition(".")[0] == "torch"
