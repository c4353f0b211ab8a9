"""The forward pass of a container as a graph, in which a part that cannot be traced is one call."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from gradl1_fast.conversion.unchanged import NotTraceableError, Watched, attributes_unchanged, unchanged
from gradl1_fast.nn.foreign import is_conv1d_of_transformers
from gradl1_fast.nn.hooks import has_hooks, has_own_forward
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["IN_PLACE_OPERATORS", "Traced", "is_holder", "is_leaf", "trace"]

# What ``a += b`` and its relatives call.
IN_PLACE_OPERATORS = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
}

_PRODUCTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.modules.batchnorm._BatchNorm)
_OURS = (QuantizedLayer, ActivationQuantizer, WeightQuantizer)


@dataclass(frozen=True)
class Traced:
    """A container's forward pass.

    Attributes:
        graph: its placeholders are the arguments without a default, in order; others have their defaults.
        kept_whole: why a container inside is one call in the graph, by its path.
    """

    graph: fx.Graph
    kept_whole: dict[str, str] = field(default_factory=dict)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one operation: of torch.nn, or derived from a layer or a normalisation."""
    if isinstance(module, (*_OURS, *_PRODUCTS)) or is_conv1d_of_transformers(module):
        return True
    return type(module).__module__.startswith("torch.nn") and not is_holder(module)


def is_holder(module: nn.Module) -> bool:
    """Return whether a module of torch.nn does nothing but hold others."""
    return type(module) is nn.Module or isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def trace(container: nn.Module) -> Traced:
    """Return the graph of a container's forward pass in its present mode, with gradients on.

    Nothing of the model changes: a part that would change a parameter, a buffer or an attribute, that
    computes with real tensors or draws random numbers while it is traced, or that fails, is kept whole.

    Raises:
        NotTraceableError: the container itself cannot be traced; the message says why.
    """
    tracer = _Tracer()
    defaults = _defaults(container)
    with torch.enable_grad(), _without_autocast(), _same_random_state():
        graph = tracer.guarded(container, unchanged, lambda: tracer.trace(container, defaults))
    _remove_defaults(graph, inspect.signature(type(container).forward).parameters.keys() - defaults.keys())
    return Traced(graph, tracer.kept_whole)


def _defaults(container: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(container).forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise NotTraceableError("its forward() takes *args or **kwargs")
    return {p.name: p.default for p in parameters if p.default is not p.empty}


class _Tracer(fx.Tracer):
    """Records what a plain ``torch.fx.Tracer`` would lose, and keeps whole what it cannot take apart."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.kept_whole: dict[str, str] = {}
        self._hooks = _saved_tensor_hooks()
        self._watched: Watched | None = None

    def guarded(self, module: nn.Module, watch: Callable[[nn.Module], Any], run: Callable[[], Any]) -> Any:
        """Run code of a model; whatever goes wrong is a NotTraceableError, and the model stays as it is."""
        _refuse_own_code(module)
        try:
            with watch(module) as watched:
                self._watched = self._watched or watched  # of the outermost, which has all
                return run()
        except NotTraceableError:
            raise
        except Exception as error:  # the model's own code runs in here: it may raise anything
            raise NotTraceableError(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node, which sees in-place operators."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one operation."""
        return is_leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module inside, or keep it whole."""
        path = self.path_of_module(m)
        if is_leaf(m):
            return super().call_module(m, forward, args, kwargs)
        before = next(reversed(self.graph.nodes))
        try:
            inside = super().call_module
            watch = functools.partial(attributes_unchanged, known=self._watched)
            return self.guarded(m, watch, lambda: inside(m, forward, args, kwargs))
        except NotTraceableError as reason:
            self._keep_whole(path, str(reason))
            self._forget_after(before)
            return self.create_proxy("call_module", path, args, kwargs)

    def _keep_whole(self, path: str, reason: str) -> None:
        """Write a module down, and forget those inside of it, which the graph does not call."""
        outside = {p: r for p, r in self.kept_whole.items() if not p.startswith(f"{path}.")}
        self.kept_whole = outside | {path: reason}

    def create_arg(self, a: Any) -> Any:
        """Return an argument as the graph keeps it; a tensor that is not the model's is refused."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, dict) and type(a) is not dict:  # which fx would make a plain one
            raise NotTraceableError(f"it creates a {type(a).__name__}")
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise NotTraceableError("it creates a tensor that does not depend on its input")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation, unless a mode is on that the graph would not have."""
        if not torch.is_grad_enabled():
            raise NotTraceableError("it disables gradients in a part of the forward pass")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise NotTraceableError("it enables autocast")
        if _saved_tensor_hooks() != self._hooks:
            raise NotTraceableError("it uses activation checkpointing or other hooks for saved tensors")
        return super().create_node(*args, **kwargs)

    def _forget_after(self, before: fx.Node) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is before:
                return
            self.graph.erase_node(node)


class _Proxy(fx.Proxy):
    """Stands for a tensor, and records ``a += b`` as such.

    fx falls back to ``a + b``, and forgets that ``a`` itself changes. Neither does it record ``a.data = b``,
    which is refused.
    """

    _is_param = False  # what isinstance(value, nn.Parameter) asks

    def __getattr__(self, name: str) -> Any:
        tracer: Any = self.tracer
        kept_whole = self.node.op == "call_module" and self.node.target in tracer.kept_whole
        if not kept_whole and not hasattr(Tensor, name):  # what is kept whole may return anything
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise NotTraceableError(f"it assigns to the {name} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise NotTraceableError("it assigns to parts of a tensor")


def _in_place(target: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _target in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_target.__name__}__", _in_place(_target))


def _refuse_own_code(module: nn.Module) -> None:
    if has_own_forward(module):
        raise NotTraceableError("its forward() was replaced")
    if has_hooks(module):
        raise NotTraceableError("it has hooks")


def _remove_defaults(graph: fx.Graph, without: Set[str]) -> None:
    """Remove what fx leaves of arguments that have their defaults: placeholders, and checks of values."""
    named = {"_assert", "_assert_is_none"}
    for node in reversed(list(graph.nodes)):
        node.type = None
        if node.users or node.op == "output":
            continue
        has_default = node.op == "placeholder" and str(node.target) not in without
        if has_default or getattr(node.target, "__name__", "") in named | {"eq"}:
            graph.erase_node(node)


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Refuse, and undo, a draw from the generators of Python and numpy: it would be made once."""
    numpy = sys.modules.get("numpy")
    before = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
        if random.getstate() != before[0] or not _same_numpy_state(numpy, before[1]):
            raise NotTraceableError("it draws random numbers with Python or numpy")
    finally:
        random.setstate(before[0])
        if numpy is not None:
            numpy.random.set_state(before[1])


def _same_numpy_state(numpy: Any, before: Any) -> bool:
    if numpy is None:
        return True
    now = numpy.random.get_state()
    return now[2] == before[2] and bool((now[1] == before[1]).all())
