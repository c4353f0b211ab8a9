"""Traces the forward pass of a container; a part that cannot be traced becomes one call."""

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
from gradl1_fast.nn.convertible import is_holder
from gradl1_fast.nn.foreign import is_conv1d_of_transformers
from gradl1_fast.nn.hooks import has_hooks, has_own_forward
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["IN_PLACE_OPERATORS", "Traced", "is_leaf", "trace"]

# The functions behind ``a += b`` and other augmented assignments.
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
    """The graph of a container's forward pass.

    Attributes:
        graph: the graph. Its placeholders are the arguments without a default, in order; other arguments have
            their default values.
        untraced: the reason for each inner container that is one call in the graph, by path.
    """

    graph: fx.Graph
    untraced: dict[str, str] = field(default_factory=dict)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is a single operation: of torch.nn, or a subclass of a layer or batch norm."""
    if isinstance(module, (*_OURS, *_PRODUCTS)) or is_conv1d_of_transformers(module):
        return True
    return type(module).__module__.startswith("torch.nn") and not is_holder(module)


def trace(container: nn.Module) -> Traced:
    """Return the graph of a container's forward pass in its current mode, with gradients enabled.

    The model is not changed. A part becomes one call if tracing it would change a parameter, a buffer or an
    attribute, would compute with real tensors or draw random numbers, or fails.

    Raises:
        NotTraceableError: the container itself cannot be traced; the message says why.
    """
    tracer = _Tracer()
    defaults = _defaults(container)
    with torch.enable_grad(), _without_autocast(), _same_random_state():
        graph = tracer.guarded(container, unchanged, lambda: tracer.trace(container, defaults))
    _remove_defaults(graph, inspect.signature(type(container).forward).parameters.keys() - defaults.keys())
    return Traced(graph, tracer.untraced)


def _by_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with the tensor that passes the site of a layer in the first place."""
    if args or not isinstance(module, QuantizedLayer) or module.input_name() not in kwargs:
        return args, kwargs
    rest = dict(kwargs)
    return (rest.pop(module.input_name()),), rest


def _defaults(container: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(container).forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise NotTraceableError("its forward() takes *args or **kwargs")
    return {p.name: p.default for p in parameters if p.default is not p.empty}


class _Tracer(fx.Tracer):
    """Records what ``torch.fx.Tracer`` would lose, and replaces parts that cannot be traced by one call."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.untraced: dict[str, str] = {}
        self._hooks = _saved_tensor_hooks()
        self._watched: Watched | None = None

    def guarded(self, module: nn.Module, watch: Callable[[nn.Module], Any], run: Callable[[], Any]) -> Any:
        """Run code of the model; turn any error into a NotTraceableError, and leave the model unchanged."""
        _refuse_own_code(module)
        try:
            with watch(module) as watched:
                self._watched = self._watched or watched  # the outermost watch covers all modules
                return run()
        except NotTraceableError:
            raise
        except Exception as error:  # the model's code may raise anything
            raise NotTraceableError(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node, which records in-place operators."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is a single operation."""
        return is_leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace an inner module, or record it as one call."""
        path = self.path_of_module(m)
        if is_leaf(m):
            return super().call_module(m, forward, *_by_position(m, args, kwargs))
        before = next(reversed(self.graph.nodes))
        try:
            inside = super().call_module
            watch = functools.partial(attributes_unchanged, known=self._watched)
            return self.guarded(m, watch, lambda: inside(m, forward, args, kwargs))
        except NotTraceableError as reason:
            self._record_untraced(path, str(reason))
            self._erase_after(before)
            return self.create_proxy("call_module", path, args, kwargs)

    def _record_untraced(self, path: str, reason: str) -> None:
        """Record a module as untraced, and drop the entries of modules inside it."""
        outside = {p: r for p, r in self.untraced.items() if not p.startswith(f"{path}.")}
        self.untraced = outside | {path: reason}

    def create_arg(self, a: Any) -> Any:
        """Return an argument in the form stored by the graph; refuse tensors that the model does not hold."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, dict) and type(a) is not dict:  # fx would convert it to a dict
            raise NotTraceableError(f"it creates a {type(a).__name__}")
        if isinstance(a, torch.Generator):  # fx would store it as an attribute of the container
            raise NotTraceableError("it draws random numbers from a generator of its own")
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise NotTraceableError("it creates a tensor that does not depend on its input")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record an operation; refuse modes that the graph would lose."""
        if not torch.is_grad_enabled():
            raise NotTraceableError("it disables gradients in a part of the forward pass")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise NotTraceableError("it enables autocast")
        if _saved_tensor_hooks() != self._hooks:
            raise NotTraceableError("it uses activation checkpointing or other hooks for saved tensors")
        return super().create_node(*args, **kwargs)

    def _erase_after(self, before: fx.Node) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is before:
                return
            self.graph.erase_node(node)


class _Proxy(fx.Proxy):
    """A proxy that records ``a += b`` as an in-place operation.

    ``fx.Proxy`` records ``a + b`` instead and loses the change of ``a``. It does not record ``a.data = b``
    either, which raises here.
    """

    _is_param = False  # read by isinstance(value, nn.Parameter)

    def __getattr__(self, name: str) -> Any:
        tracer: Any = self.tracer
        untraced = self.node.op == "call_module" and self.node.target in tracer.untraced
        if not untraced and not hasattr(Tensor, name):  # an untraced module may return any object
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
    """Remove the placeholders and checks that fx leaves for arguments with defaults."""
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
    """Refuse and undo random numbers drawn with Python or numpy: a graph would reuse their values."""
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
