"""Marks for integer kernels at biases, and at operands of sums, concatenations and average pools.

onnxruntime computes a convolution in float if no quantizer follows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gradl1_fast.quantization.export.marks import MARK, Mark

__all__ = ["add_biases", "add_joints"]

_aten = torch.ops.aten
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor}
_POOLS = {_aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default}
_DEFAULTS = (None, None, None, 0, False, True, None)  # defaults of avg_pool2d
_PRODUCTS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default}
# Operations allowed between a layer and a joint: they preserve codes or are fused into the next quantizer.
_TRANSPARENT = {
    *(_aten.relu.default, _aten.relu_.default, _aten.max_pool2d.default, _aten.hardtanh.default),
    *(_aten.hardtanh_.default, _aten.clamp.default, _aten.relu6.default, _aten.dropout.default),
}


def add_joints(exported: torch.export.ExportedProgram, marks: list[Mark]) -> None:
    """Mark the operands of each operation between layers if all of them come from layers and sites."""
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        operands = _operands(node)
        if not operands or not _is_pure(node):
            continue
        needed = [_needed(operand, marks) for operand in operands]
        if all(keys is not None for keys in needed):
            all_keys = [key for keys in needed for key in keys or ()]
            for operand in operands:
                _mark(graph, node, operand, all_keys, marks)
    graph.lint()
    exported.graph_module.recompile()


def add_biases(exported: torch.export.ExportedProgram, marks: list[Mark]) -> None:
    """Mark the biases of layers whose input and weight are marked."""
    graph = exported.graph_module.graph
    for node in list(graph.nodes):
        keys = _keys_of(node) if node.target in _PRODUCTS else None
        bias = node.args[2] if keys and len(node.args) > 2 else None
        if keys and isinstance(bias, fx.Node) and bias.op == "placeholder":  # only constants have codes
            with graph.inserting_before(node):
                mark = graph.call_function(MARK, (bias, len(marks)))
            mark.meta = {"val": bias.meta["val"], **_source(node)}
            marks.append(Mark("bias", f"{marks[keys[1]].name}.bias", keys))
            node.replace_input_with(bias, mark)
    graph.lint()
    exported.graph_module.recompile()


def _keys_of(product: fx.Node) -> list[int] | None:
    """Return the marks of a layer's input and weight by number, or None if one is missing."""
    pair = product.args[:2]
    keys = [arg.args[1] for arg in pair if isinstance(arg, fx.Node) and arg.target is MARK]
    return keys if len(keys) == 2 else None  # type: ignore[return-value]


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a sum of two tensors of the same shape, a concatenation or an average pool."""
    if node.target in _SUMS and not node.kwargs:
        operands = list(node.args)
        if not all(isinstance(operand, fx.Node) for operand in operands):
            return []
        shapes = [getattr(operand.meta.get("val"), "shape", None) for operand in operands]  # type: ignore[union-attr]
        return operands if shapes[0] is not None and shapes[0] == shapes[1] else []  # type: ignore[return-value]
    if node.target is _aten.cat.default:
        return list(node.args[0])  # type: ignore[arg-type]
    return [node.args[0]] if _is_pool(node) else []  # type: ignore[list-item]


def _is_pool(node: fx.Node) -> bool:
    """Return whether a node is an average pool that onnxruntime's integer kernel computes correctly.

    If a window extends beyond the padding, which ``ceil_mode`` allows, the kernel's divisor wrongly includes
    the outside.
    """
    if node.target not in _POOLS:
        return False
    ceil_mode, counts_padding = [*node.args, *_DEFAULTS[len(node.args) :]][4:6]
    return not (ceil_mode and counts_padding)


def _is_pure(node: fx.Node) -> bool:
    """Return whether a node changes no tensor; replace in-place variants if this has no effect."""
    if node.target is not _aten.add_.Tensor:
        return True
    changed: Any = node.args[0]
    if changed.target not in _PRODUCTS or set(changed.users) != {node}:
        return False
    node.target = _aten.add.Tensor
    return True


def _needed(node: fx.Node, marks: list[Mark]) -> list[int] | None:
    """Return the marks that must be quantized for a tensor to consist of codes, or None."""
    site = _site_of(node, marks)
    if site is not None:
        return [site]
    while node.target in _TRANSPARENT:
        node = node.args[0]  # type: ignore[assignment]
    if node.target in _PRODUCTS:
        return _keys_of(node)
    return _marks_among(_operands(node))


def _marks_among(operands: list[fx.Node]) -> list[int] | None:
    """Return the marks of a joint's operands, or None if an operand has no mark or there are none."""
    keys = [int(operand.args[1]) for operand in operands if operand.target is MARK]  # type: ignore[arg-type]
    return keys if keys and len(keys) == len(operands) else None


def _site_of(node: fx.Node, marks: list[Mark]) -> int | None:
    """Return the number of the site between a tensor and layers that read it, or None."""
    if any(_changes_in_place(user) for user in node.users):
        return None  # it is changed in place
    keys = [int(user.args[1]) for user in node.users if user.target is MARK]  # type: ignore[arg-type]
    return next((key for key in keys if marks[key].kind == "site"), None)


def _changes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _mark(graph: fx.Graph, node: fx.Node, operand: fx.Node, keys: list[int], marks: list[Mark]) -> None:
    """Insert a mark between an operand and ``node``."""
    if operand.target is MARK:
        return
    site = _site_of(operand, marks)
    with graph.inserting_after(operand):
        mark = graph.call_function(MARK, (operand, len(marks)))
    mark.meta = {"val": operand.meta["val"], **_source(operand)}
    marks.append(Mark("joint", operand.name if site is None else marks[site].name, keys, site))
    node.replace_input_with(operand, mark)


def _source(node: fx.Node) -> dict[str, Any]:
    names = ("nn_module_stack", "stack_trace", "torch_fn", "from_node")
    return {name: node.meta[name] for name in names if name in node.meta}
