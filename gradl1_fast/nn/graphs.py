"""What the nodes of a traced graph call, and which of their results may share memory."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx, nn

from gradl1_fast.nn.trace import IN_PLACE_OPERATORS, PLAIN_LAYERS

__all__ = ["count_calls", "memory_of", "module_of", "name_in_place", "operation_of"]

# What returns memory of its own, or no tensor, as a function or as a method. Anything else may return a view.
_FRESH_NAMES = (
    *("abs", "add", "addmm", "amax", "amin", "argmax", "argmin", "baddbmm", "bmm", "cat", "clamp"),
    *("clone", "concat", "cos", "div", "exp", "floor_divide", "log", "logsumexp", "matmul", "max"),
    *("maximum", "mean", "min", "minimum", "mm", "mul", "neg", "pow", "prod", "rsqrt", "sin", "sqrt"),
    *("square", "stack", "std", "sub", "sum", "topk", "var", "where", "eq", "ge", "gt", "le", "lt", "ne"),
    *("dim", "numel", "size", "empty_like", "full_like", "ones_like", "rand_like", "randn_like"),
    *("zeros_like", "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
    *("log_softmax", "logsigmoid", "mish", "prelu", "relu", "relu6", "selu", "sigmoid", "silu"),
    *("softmax", "softplus", "softsign", "tanh", "threshold", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "embedding", "interpolate"),
    *("batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm", "normalize"),
    *("rms_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("lp_pool1d", "lp_pool2d", "lp_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("scaled_dot_product_attention", "addcdiv", "addcmul", "cumsum", "flip", "gather", "grid_sample"),
    *("index_select", "lerp", "masked_fill", "pad", "repeat", "roll"),
)
_FRESH = {
    *_FRESH_NAMES,
    *(getattr(home, name, name) for home in (torch, nn.functional, operator) for name in _FRESH_NAMES),
    *(operator.floordiv, operator.mod, operator.truediv),
}
# The homes of modules that do so, but for the Identity.
_HOMES = ("activation", "batchnorm", "conv", "instancenorm", "linear", "normalization", "pooling")
_FRESH_HOMES = {f"torch.nn.modules.{home}" for home in (*_HOMES, "upsampling")}
_VIEW_ATTRIBUTES = ("data", "grad", "H", "imag", "mH", "mT", "real", "T")


def module_of(graph_root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None."""
    return graph_root.get_submodule(str(node.target)) if node.op == "call_module" else None


def operation_of(node: fx.Node) -> object:
    """Return the function, or the name of the method, that a node calls, or None."""
    return node.target if node.op in ("call_function", "call_method") else None


def count_calls(root: nn.Module, graph: fx.Graph) -> Counter[int]:
    """Return how often each module is called, by the identity of the module."""
    return Counter(id(module_of(root, node)) for node in graph.nodes if node.op == "call_module")


def name_in_place(node: fx.Node) -> str | None:
    """Return the name of an operation that by its name works in place."""
    if node.op not in ("call_method", "call_function"):
        return None
    name = str(getattr(node.target, "__name__", node.target))
    python = getattr(node.target, "__module__", "") == "_operator"  # and_, or_, not_
    return name if name.endswith("_") and not name.startswith("_") and not python else None


def memory_of(root: nn.Module, graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Return for each node where the memory that its result may share was made."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        shared = [] if _is_fresh(root, node) else node.all_input_nodes
        if node.target in IN_PLACE_OPERATORS or name_in_place(node):
            shared = shared[:1]
        found[node] = {start for n in shared for start in found[n]} or {node}
    return found


def _is_fresh(root: nn.Module, node: fx.Node) -> bool:
    module = module_of(root, node)
    if module is not None:
        at_home = type(module).__module__ in _FRESH_HOMES and not isinstance(module, nn.Identity)
        return at_home or isinstance(module, PLAIN_LAYERS)
    if any(isinstance(arg, tuple | list) for arg in node.args) and node.target is operator.add:
        return False  # a tuple made of tensors holds them themselves
    if node.target is getattr:
        return node.args[1] not in _VIEW_ATTRIBUTES
    return operation_of(node) in _FRESH
