"""How each operation of a converted model is said in ONNX; what is not here is refused by name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from gradl1_fast.nn.act import Act2d
from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.converted import ConvertedModel
from gradl1_fast.nn.layers import QConv1d, QConv2d, QConv3d, QLinear, QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer
from gradl1_fast.quantization.export.integers import integer_type
from gradl1_fast.quantization.export.onnx_graph import OnnxGraph
from gradl1_fast.quantization.export.prepared import NotExportableError

__all__ = ["Writer"]


@dataclass
class Writer:
    """Says a converted model in ONNX, node by node.

    Attributes:
        model: in evaluation mode.
        w: bits of the weights, None for float.
        a: bits of the activations, None for float.
        shapes: of the output of each node, for one batch.
        graph: what has been said so far.
        values: name in ``graph`` of the output of each node.
        quantized: name in ``graph`` of the output of each activation quantizer, by its name in the model.
        remarks: sentences on what could not be said as asked for.
        wide: ``"a"``, ``"w"`` or both: what has codes in types of 8 bits at the least.
        sizes: nodes that compute with sizes, no tensors.
    """

    model: ConvertedModel
    w: int | None
    a: int | None
    shapes: dict[fx.Node, torch.Size]
    graph: OnnxGraph = field(default_factory=OnnxGraph)
    values: dict[fx.Node, str] = field(default_factory=dict)
    quantized: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, None] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    sizes: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._names = {id(module): name for name, module in self.model.named_modules()}

    def write(self, node: fx.Node) -> None:
        """Say one node.

        Raises:
            NotExportableError: there is no way to say it.
        """
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.model)
            self.values[node] = self.graph.constant(str(node.target), value.detach().float())
            return
        if self._is_of_sizes(node):
            self.sizes.add(node)
            return
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        say = _MODULES.get(type(module)) if module is not None else _FUNCTIONS.get(node.target)
        if say is None:
            raise self.refusal(node, "is no operation that export knows")
        self.values[node] = say(self, node, module)

    def _is_of_sizes(self, node: fx.Node) -> bool:
        """Whether a node computes with sizes of tensors, which the shapes already tell."""
        if node.target == "size" or (node.target is getattr and node.args[1:] == ("shape",)):
            return True
        inputs = node.all_input_nodes
        return bool(inputs) and node not in self.shapes and all(x in self.sizes for x in inputs)

    def refusal(self, node: fx.Node, reason: str) -> NotExportableError:
        """Return the error that names a node and its operation."""
        if node.op == "call_module":
            where, kind = str(node.target), type(self.model.get_submodule(str(node.target))).__name__
        else:
            where, kind = node.name, str(getattr(node.target, "__name__", node.target))
        return NotExportableError(f"{where} ({kind}) {reason}")

    def operand(self, node: fx.Node, place: int = 0) -> str:
        """Return the name of a tensor that a node reads."""
        value = node.args[place]
        if isinstance(value, fx.Node) and value in self.values:
            return self.values[value]
        if isinstance(value, int | float):
            return self.graph.constant(f"{node.name}.number", torch.tensor(float(value)))
        raise self.refusal(node, f"reads {value!r}, which is no tensor of the graph")

    def weight(self, layer: QuantizedLayer) -> str:
        """Say the weight of a layer, as codes at the present width."""
        name = f"{self._names[id(layer)]}.weight"
        weight = layer.weight.detach()
        if self.w is None:
            return self.graph.constant(name, weight)
        scale, _, q_min, q_max = layer.weight_quantizer.grid(weight, self.w)
        axis = layer.weight_quantizer.axis
        along = scale if axis is None else scale.reshape(-1, *[1] * (weight.dim() - 1))
        codes = (weight / along).round().clamp(q_min, q_max)
        type_, remark = integer_type(self.w, signed=True, narrow="w" not in self.wide)
        self.remark(remark)
        stored = self.graph.integers(f"{name}.codes", codes, type_)
        step = self.graph.constant(f"{name}.scale", scale)
        return self.graph.dequantized(name, stored, step, None, axis)

    def bias(self, layer: QuantizedLayer) -> list[str]:
        """Say the bias of a layer, if it has one."""
        if layer.bias is None:
            return []
        return [self.graph.constant(f"{self._names[id(layer)]}.bias", layer.bias.detach())]

    def activation(self, x: str, quantizer: ActivationQuantizer | None) -> str:
        """Say a quantizer behind a tensor."""
        if quantizer is None or self.a is None:
            return x
        name = self._names[id(quantizer)]
        scale, zero_point, _, q_max = quantizer.grid(torch.float32, self.a)
        type_, remark = integer_type(self.a, signed=False, narrow="a" not in self.wide)
        self.remark(remark)
        self.quantized[name] = self.graph.quantized(x, name, scale, zero_point, q_max, type_)
        return self.quantized[name]

    def activated(self, x: str, kind: str, wanted: str) -> str:
        """Say ``"none"``, ``"relu"`` or ``"relu6"``."""
        if kind == "none":
            return x
        if kind == "relu" or self.a in (2, 4):
            x = self.graph.node("Relu", [x], wanted)
        if kind == "relu":
            return x
        if self.a in (2, 4):  # onnxruntime fails at a Clip before a quantizer of these types
            six = self.graph.constant(f"{wanted}.6", torch.tensor(6.0))
            return self.graph.node("Min", [x, six], wanted)
        ends = [self.graph.constant(f"{wanted}.{end}", torch.tensor(float(end))) for end in (0, 6)]
        return self.graph.node("Clip", [x, *ends], wanted)

    def remark(self, remark: str | None) -> None:
        """Note a sentence, once."""
        if remark is not None:
            self.remarks[remark] = None


Say = Callable[[Writer, fx.Node, Any], str]


def _convolution(writer: Writer, node: fx.Node, layer: Any) -> str:
    if layer.padding_mode != "zeros":
        raise writer.refusal(node, f"has padding_mode={layer.padding_mode!r}; export knows 'zeros'")
    x = writer.activation(writer.operand(node), layer.input_quantizer)
    inputs = [x, writer.weight(layer), *writer.bias(layer)]
    return writer.graph.node(
        "Conv",
        inputs,
        str(node.target),
        kernel_shape=list(layer.kernel_size),
        strides=list(layer.stride),
        dilations=list(layer.dilation),
        pads=_conv_pads(layer),
        group=layer.groups,
    )


def _conv_pads(layer: Any) -> list[int]:
    """Return the padding before each dimension, then after each."""
    if layer.padding == "valid":
        return [0] * 2 * len(layer.kernel_size)
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [t // 2 for t in total] + [t - t // 2 for t in total]
    return [*layer.padding, *layer.padding]


def _linear(writer: Writer, node: fx.Node, layer: QLinear) -> str:
    x = writer.activation(writer.operand(node), layer.input_quantizer)
    weight, bias, name = writer.weight(layer), writer.bias(layer), str(node.target)
    if len(writer.shapes[node]) == 2:
        return writer.graph.node("Gemm", [x, weight, *bias], name, transB=1)
    turned = writer.graph.node("Transpose", [weight], f"{name}.weight.T", perm=[1, 0])
    y = writer.graph.node("MatMul", [x, turned], name)
    return writer.graph.node("Add", [y, *bias], f"{name}.biased") if bias else y


def _batch_norm(writer: Writer, node: fx.Node, norm: Any) -> str:
    if norm.running_mean is None or norm.running_var is None:
        raise writer.refusal(node, "has no running statistics")
    ones = torch.ones_like(norm.running_mean)
    vectors = {
        "weight": ones if norm.weight is None else norm.weight,
        "bias": 0 * ones if norm.bias is None else norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
    name = str(node.target)
    constants = [writer.graph.constant(f"{name}.{key}", value.detach()) for key, value in vectors.items()]
    inputs = [writer.operand(node), *constants]
    return writer.graph.node("BatchNormalization", inputs, name, epsilon=norm.eps)


def _batch_norm_act(writer: Writer, node: fx.Node, norm: BatchNormAct2d) -> str:
    return _tail(writer, node, norm, _batch_norm(writer, node, norm))


def _act(writer: Writer, node: fx.Node, act: Act2d) -> str:
    return _tail(writer, node, act, writer.operand(node))


def _tail(writer: Writer, node: fx.Node, module: Any, y: str) -> str:
    """Say the residual sum, the activation and the quantizer."""
    residual = node.kwargs.get("residual", node.args[1] if len(node.args) > 1 else None)
    name = str(node.target)
    if isinstance(residual, fx.Node):
        y = writer.graph.node("Add", [y, writer.values[residual]], f"{name}.sum")
    elif residual is not None:
        raise writer.refusal(node, f"adds {residual!r}, which is no tensor of the graph")
    y = writer.activated(y, module.activation, f"{name}.{module.activation}")
    return writer.activation(y, module.quantizer)


def _quantizer(writer: Writer, node: fx.Node, quantizer: ActivationQuantizer) -> str:
    return writer.activation(writer.operand(node), quantizer)


def _activation(kind: str) -> Say:
    return lambda writer, node, _: writer.activated(writer.operand(node), kind, node.name)


def _same(writer: Writer, node: fx.Node, _: object) -> str:
    return writer.operand(node)


def _two(operation: str) -> Say:
    def say(writer: Writer, node: fx.Node, _: object) -> str:
        if node.kwargs or len(node.args) != 2:
            raise writer.refusal(node, "has arguments besides its two operands")
        return writer.graph.node(operation, [writer.operand(node, i) for i in (0, 1)], node.name)

    return say


def _concatenate(writer: Writer, node: fx.Node, _: object) -> str:
    tensors, dim = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(tensors, list | tuple) or not all(t in writer.values for t in tensors):
        raise writer.refusal(node, "joins what are no tensors of the graph")
    return writer.graph.node("Concat", [writer.values[t] for t in tensors], node.name, axis=dim)  # type: ignore[index]


def _flatten(writer: Writer, node: fx.Node, module: nn.Flatten | None) -> str:
    rank = len(writer.shapes[node.all_input_nodes[0]])
    if module is not None:
        start, end = module.start_dim, module.end_dim
    else:
        start, end = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
    if start % rank != 1 or end % rank != rank - 1:
        raise writer.refusal(node, f"flattens dimensions {start} to {end}; export knows all but the first")
    return writer.graph.node("Flatten", [writer.operand(node)], node.name, axis=1)


def _reshape(writer: Writer, node: fx.Node, _: object) -> str:
    before, after = writer.shapes[node.all_input_nodes[0]], writer.shapes[node]
    if len(after) != 2 or before[0] != after[0]:
        raise writer.refusal(
            node, f"turns {tuple(before)} to {tuple(after)}; export knows the flattening of all but the batch"
        )
    return writer.graph.node("Flatten", [writer.operand(node)], node.name, axis=1)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _mean(writer: Writer, node: fx.Node, _: object) -> str:
    dims, keep = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
    if not isinstance(dims, int | list | tuple):
        raise writer.refusal(node, f"is over dim={dims!r}; export knows numbers of dimensions")
    axes = writer.graph.constant(f"{node.name}.axes", torch.tensor([dims] if isinstance(dims, int) else dims))
    return writer.graph.node("ReduceMean", [writer.operand(node), axes], node.name, keepdims=int(keep))


def _pool(writer: Writer, node: fx.Node, pool: Any) -> str:
    if pool.ceil_mode or getattr(pool, "return_indices", False) or getattr(pool, "divisor_override", None):
        raise writer.refusal(node, "has ceil_mode, return_indices or divisor_override")
    n = len(writer.shapes[node]) - 2
    size, padding = _sizes(pool.kernel_size, n), _sizes(pool.padding, n)
    attributes: dict[str, Any] = {
        "kernel_shape": size, "strides": _sizes(pool.stride, n), "pads": [*padding, *padding],
    }  # fmt: skip
    if hasattr(pool, "dilation"):
        attributes["dilations"] = _sizes(pool.dilation, n)
        return writer.graph.node("MaxPool", [writer.operand(node)], node.name, **attributes)
    attributes["count_include_pad"] = int(pool.count_include_pad)
    return writer.graph.node("AveragePool", [writer.operand(node)], node.name, **attributes)


def _sizes(value: int | Sequence[int], n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value)


def _adaptive(operation: str) -> Say:
    def say(writer: Writer, node: fx.Node, _: object) -> str:
        before, after = (writer.shapes[n][2:] for n in (node.all_input_nodes[0], node))
        if any(b % a for b, a in zip(before, after, strict=True)):
            raise writer.refusal(node, f"pools {tuple(before)} to {tuple(after)}, which does not divide it")
        size = [b // a for b, a in zip(before, after, strict=True)]
        return writer.graph.node(
            operation, [writer.operand(node)], node.name, kernel_shape=size, strides=size
        )

    return say


def _function(module: type[nn.Module]) -> Say:
    """Say a function of which ``module`` takes the same arguments after the first."""

    def say(writer: Writer, node: fx.Node, _: object) -> str:
        if len(node.args) > 5 and module is nn.MaxPool2d:
            raise writer.refusal(node, "has more arguments than export knows")  # here the order differs
        return _pool(writer, node, module(*node.args[1:], **node.kwargs))

    return say


_MODULES: dict[type[nn.Module], Say] = {
    **dict.fromkeys((QConv1d, QConv2d, QConv3d), _convolution),
    QLinear: _linear,
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    BatchNormAct2d: _batch_norm_act,
    Act2d: _act,
    ActivationQuantizer: _quantizer,
    nn.ReLU: _activation("relu"),
    nn.ReLU6: _activation("relu6"),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _same),
    nn.Flatten: _flatten,
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _pool),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive("AveragePool")
    ),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive("MaxPool")),
}
_FUNCTIONS: dict[Any, Say] = {
    **dict.fromkeys((torch.relu, F.relu, "relu"), _activation("relu")),
    F.relu6: _activation("relu6"),
    **dict.fromkeys((operator.add, torch.add, "add"), _two("Add")),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _two("Mul")),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.reshape, "reshape", "view"), _reshape),
    **dict.fromkeys((torch.cat, torch.concat), _concatenate),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    F.max_pool2d: _function(nn.MaxPool2d),
    F.avg_pool2d: _function(nn.AvgPool2d),
    F.adaptive_avg_pool2d: _adaptive("AveragePool"),
}
