"""Reports what a converted model quantizes, what it leaves in float, and which containers run a plan."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from gradl1_fast._checks import MAX_BITS
from gradl1_fast._shown import Grid, Shown
from gradl1_fast.conversion.by_function import used_by_function
from gradl1_fast.conversion.graphs import kind_of, layer_of, module_of
from gradl1_fast.conversion.left import left_in_float
from gradl1_fast.conversion.planned import Planned
from gradl1_fast.conversion.trace import is_leaf
from gradl1_fast.conversion.tracing import Part, parts_of
from gradl1_fast.nn.layers import QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, WeightQuantizer
from gradl1_fast.nn.sites import named_layers, named_quantizers

__all__ = ["Report", "report"]

_NAMES_OF_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "softmax", "scaled_dot_product_attention"}
_OURS = (QuantizedLayer, ActivationQuantizer, WeightQuantizer)


@dataclass(repr=False)
class Report(Shown):
    """Rows of text by section; ``print``, or a notebook, shows them as tables.

    Attributes:
        layers: name, class, shape of the weight, bits of the weight, ranges of the weight.
        sites: name, bits, range, whether a penalty counts the tensor.
        unquantized: name and kind of each weight and operation that computes in float at any width.
        plans: container, number of layers, and why it has no plan; empty if it has one.
        regions: for containers whose plan has run: container, first and last operation, number of layers, and
            why the last penalised step ran the operators one by one; empty if it ran one region.
    """

    layers: list[tuple[str, ...]] = field(default_factory=list)
    sites: list[tuple[str, ...]] = field(default_factory=list)
    unquantized: list[tuple[str, ...]] = field(default_factory=list)
    plans: list[tuple[str, int, str]] = field(default_factory=list)
    regions: list[tuple[str, str, int, str]] = field(default_factory=list)

    _between = "\n\n"

    def _parts(self) -> Iterator[Grid]:
        plans = [(name or "the model", str(count), reason or "planned") for name, count, reason in self.plans]
        regions = [
            (name or "the model", nodes, str(count), reason) for name, nodes, count, reason in self.regions
        ]
        yield Grid(("name", "class", "weight", "bits", "ranges"), self.layers, "Layers")
        yield Grid(("name", "bits", "range", "penalised"), self.sites, "Sites")
        yield Grid(("name", "operation"), self.unquantized, "Left in float")
        yield Grid(("container", "layers", "state"), plans, "Plans")
        yield Grid(("container", "operations", "layers", "why not one region"), regions, "Regions")


def report(model: nn.Module) -> Report:
    """Return a printable report of all layers and sites, of what stays in float, and of the plans.

    The forward pass is traced where possible. For containers that cannot be traced, the report lists the
    operations named in their source. After a step with a penalty, the plans show what that step ran, and the
    regions show which operations of a plan ran as one node of the autograd graph.

    Args:
        model: a converted model, or one that contains layers of this library.
    """
    parts = list(parts_of(model))
    used = used_by_function(model, parts)
    result = Report()
    for name, layer in named_layers(model).items():
        result.layers.append(_layer_row(name, layer, used.get(id(layer), "")))
    result.sites.extend(_site_row(name, quantizer) for name, quantizer in named_quantizers(model).items())
    result.unquantized.extend(dict.fromkeys(_unquantized(model, parts)))
    result.unquantized.extend((name, f"weight used by {kind}") for name, kind in _named(model, used))
    result.unquantized.extend(_never_called(model, used))
    result.plans.extend(map(_plan_row, parts))
    for part in parts:
        planned = part.container._compiled_call_impl
        for region in planned.regions if isinstance(planned, Planned) else ():
            result.regions.append((part.name, region.name, region.layers, region.reason))
    return result


def _named(model: nn.Module, used: dict[int, str]) -> Iterator[tuple[str, str]]:
    return ((name, used[id(layer)]) for name, layer in named_layers(model).items() if id(layer) in used)


def _never_called(model: nn.Module, used: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Yield the layers that have not been called, if other layers have been."""
    layers = named_layers(model)
    if any(layer.was_called for layer in layers.values()):
        for name, layer in layers.items():
            if not layer.was_called and id(layer) not in used:
                yield name, "not called yet: a function that uses its weight uses it in float"


def _unquantized(model: nn.Module, parts: list[Part]) -> Iterator[tuple[str, ...]]:
    for entry in left_in_float(model):
        name, _, kind = entry.rpartition(" (")
        yield name, kind.removesuffix(")")
    for part in parts:
        if part.traced is None:
            yield from _from_source(part)
            continue
        for node in part.traced.graph.nodes:
            if _computes_in_float(part.container, node):
                yield f"{part.name}.{_name(node)}".removeprefix("."), kind_of(part.container, node)
    for name, module in model.named_modules():
        inside = is_leaf(module) and not isinstance(module, _OURS)
        if inside and not list(module.children()) and not _is_traced(name, parts):
            yield name, type(module).__name__


def _from_source(part: Part) -> Iterator[tuple[str, ...]]:
    """Yield the operations named in the source of a container that cannot be traced."""
    code = getattr(type(part.container).forward, "__code__", None)
    names = _NAMES_OF_PRODUCTS & set(code.co_names) if code else set()
    if code and any(map(_is_product, dis.get_instructions(code))):
        names.add("matmul")
    for name in sorted(names):
        yield part.name or "the model", name
    yield part.name or "the model", f"unknown operations: {part.reason}"


def _is_product(instruction: dis.Instruction) -> bool:
    """Return whether an instruction is the operator ``@``; Python 3.10 has an opcode of its own for it."""
    return instruction.opname.endswith("MATRIX_MULTIPLY") or instruction.argrepr in ("@", "@=")


def _computes_in_float(root: nn.Module, node: fx.Node) -> bool:
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    module = module_of(root, node)
    return module is None or (is_leaf(module) and not isinstance(module, _OURS))


def _is_traced(name: str, parts: list[Part]) -> bool:
    """Return whether a module is part of a traced graph, and listed by it."""
    for part in parts:
        inside = not part.name or name.startswith(f"{part.name}.")
        if part.traced is not None and inside:
            path = name.removeprefix(f"{part.name}.") if part.name else name
            if not any(path.startswith(f"{prefix}.") for prefix in part.traced.untraced):
                return True
    return False


def _plan_row(part: Part) -> tuple[str, int, str]:
    container = part.container
    if part.traced is not None:
        count = sum(layer_of(container, node) is not None for node in part.traced.graph.nodes)
        planned = container._compiled_call_impl
        ran = isinstance(planned, Planned) and planned.has_run
        return part.name, count, planned.reason if ran else ""  # type: ignore[union-attr]
    children = [m for m in container.children() if isinstance(m, QuantizedLayer)]
    return part.name, len(children), f"not planned: {part.reason}"


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _layer_row(name: str, layer: QuantizedLayer, used: str) -> tuple[str, ...]:
    quantizer = layer.weight_quantizer
    ranges = "per tensor" if quantizer.axis is None else "per channel"
    bits = _bits(quantizer.bits)
    if used:
        bits = f"float: used by {used}"
    elif quantizer.bits is not None and not layer.was_called:
        bits = f"{bits}, but not called yet"
    return name, type(layer).__name__, "x".join(map(str, layer.weight.shape)), bits, ranges


def _site_row(name: str, quantizer: ActivationQuantizer) -> tuple[str, ...]:
    ends = "not calibrated"
    if quantizer.low is not None:
        low, high = quantizer.range_at(quantizer.bits or MAX_BITS)
        ends = f"{float(low):.4g} to {float(high):.4g}"
    return name, _bits(quantizer.bits), ends, "no: network input" if quantizer.is_input else "yes"


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)
