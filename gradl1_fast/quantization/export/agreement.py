"""Compares an exported file with the simulation: codes, outputs and decisions on real inputs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradl1_fast import _shown
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.filling import occurrence
from gradl1_fast.quantization.export.integers import session
from gradl1_fast.quantization.export.packages import onnx

if TYPE_CHECKING:
    from gradl1_fast.quantization.export.marks import Grid
    from gradl1_fast.quantization.export.onnx_file import Exported
    from gradl1_fast.quantization.export.prepared import Prepared

__all__ = [
    "ACCURACY",
    "CODES",
    "OUTPUTS",
    "TOP_1",
    "Agreement",
    "compare",
    "compare_model",
    "compare_torch",
    "feed_of",
]

CODES = 1  # a value between two codes may be rounded to either
OUTPUTS = 1e-3  # relative to the largest output
TOP_1 = 0.99
ACCURACY = 1.0  # points below the simulation


@dataclass(frozen=True, repr=False)
class Agreement(_shown.Shown):
    """The difference between a file and the simulation.

    Codes and outputs are compared step by step: the simulation computes each quantized activation from the
    previous codes of the file, so an edge case is counted only once. The decisions are compared end to end.

    Attributes:
        inputs: the number of inputs that were compared.
        codes: largest difference of two codes, 0 in float.
        where: name of the quantized activation with the largest difference.
        differing: share of the codes that differ.
        outputs: largest difference of two outputs, relative to the largest output.
        top_1: share of the inputs for which the same index has the largest output, alone or in a tie.
        end_to_end: largest difference of two outputs end to end, relative to the largest output.
        accuracy: accuracy of the file in percent, if labels were given.
        expected: accuracy of the simulation in percent.
        overflows: whether a session without ``session.x64quantprecision`` computes other outputs here.
    """

    inputs: int
    codes: int
    where: str
    differing: float
    outputs: float
    top_1: float
    end_to_end: float
    accuracy: float | None = None
    expected: float | None = None
    overflows: bool = False

    def rows(self) -> list[tuple[str, str, str]]:
        """Return each measurement with its bound."""
        rows = []
        if self.where:  # there are codes
            rows += [
                ("largest code difference", str(CODES), f"{self.codes} ({self.where})"),
                ("codes that differ", "", f"{100 * self.differing:.2g} %"),
            ]
        rows += [
            ("largest error, relative to the largest output", f"{OUTPUTS:g}", f"{self.outputs:.1e}"),
            ("the same end to end", "", f"{self.end_to_end:.1e}"),
            ("top-1 agreement", f"{100 * TOP_1:g} %", f"{100 * self.top_1:.2f} %"),
        ]
        if self.accuracy is not None and self.expected is not None:
            bound = f"{self.expected - ACCURACY:.2f} %"
            rows.append(("accuracy of the file", bound, f"{self.accuracy:.2f} %"))
        if self.overflows:
            rows.append(("a default session overflows here", "", "set session.x64quantprecision to 1"))
        return rows

    def _parts(self) -> Iterator[_shown.Grid]:
        title = f"File against simulation, {self.inputs} inputs"
        yield _shown.Grid(("measured", "bound", "file"), self.rows(), title, right=(1, 2))

    def faults(self) -> list[str]:
        """Return a sentence for each violated bound."""
        faults = []
        if self.codes > CODES:
            faults.append(f"codes at {self.where} differ by {self.codes}, allowed is {CODES}")
        if not self.outputs <= OUTPUTS:
            faults.append(f"outputs differ by {self.outputs:.2g} of the largest, allowed is {OUTPUTS:g}")
        if not self.top_1 >= TOP_1:
            faults.append(f"top-1 agreement is {100 * self.top_1:.2f} %, required is {100 * TOP_1:g} %")
        if self.expected is not None and (self.accuracy or 0.0) < self.expected - ACCURACY:
            faults.append(f"accuracy is {self.accuracy:.2f} %, in the simulation {self.expected:.2f} %")
        return faults


def compare(
    exported: Exported,
    inputs: Any,
    *,
    labels: Tensor | None = None,
    fused: bool = True,
    batch_size: int = 100,
) -> Agreement:
    """Run the file in onnxruntime on the CPU and compare it with the simulation.

    Args:
        exported: the result of :func:`export_onnx`.
        inputs: real inputs of the model.
        labels: labels of the inputs, for accuracies.
        fused: use a default session, in which onnxruntime replaces quantized operations by its own operations
            in integer arithmetic, and ``session.x64quantprecision=1``, without which x86 processors that
            lack VNNI overflow. Otherwise each node is computed separately (session option
            ``session.disable_quant_qdq=1``).
        batch_size: the number of inputs per run.

    Raises:
        ImportError: onnxruntime is not installed.
        TypeError: the file is of another format; ``FORMATS[name].compare(file, inputs)`` compares any.
        ValueError: there are no inputs.
    """
    if not hasattr(exported, "in_float"):  # of ONNX files alone
        raise TypeError(
            f"compare: expected the result of export_onnx, got {type(exported).__name__}; compare other "
            "formats by gradl1_fast.quantization.export.formats.FORMATS[name].compare(file, inputs)"
        )
    arguments = Arguments.of(inputs)
    if not arguments.size:
        raise ValueError("compare: there are no inputs")
    file = session(exported.data, fused=fused)
    watched = session(_with_outputs(exported), fused=fused)
    tally = _Tally()
    with torch.no_grad():
        for part, wanted in _batches(arguments, labels, batch_size):
            _compare_batch(exported, file, watched, part, wanted, tally)
        first = next(iter(arguments.split(batch_size)))
        overflows = fused and _overflows(exported, file, feed_of(exported, first))
    return replace(tally.result(), overflows=overflows)


def _overflows(exported: Exported, file: Any, feed: dict[str, Any]) -> bool:
    """Return whether a default session computes other outputs than one with exact sums."""
    default = session(exported.data, exact=False)
    pairs = zip(default.run(exported.outputs, feed), file.run(exported.outputs, feed), strict=True)
    return any(one.tobytes() != other.tobytes() for one, other in pairs)


def compare_torch(
    data: bytes, prepared: Prepared, inputs: Any, *, labels: Tensor | None = None, batch_size: int = 100
) -> Agreement:
    """Run a ``.pt2`` file and compare its outputs with the simulation.

    Args:
        data: the result of :func:`export_torch`.
        prepared: the simulation.
        inputs: real inputs of the model.
        labels: labels of the inputs, for accuracies.
        batch_size: the number of inputs per run.

    Raises:
        ValueError: there are no inputs.
    """
    program = torch.export.load(io.BytesIO(data)).module()
    return compare_model(program, prepared, inputs, labels=labels, batch_size=batch_size)


def compare_model(
    model: Callable[..., Any],
    prepared: Prepared,
    inputs: Any,
    *,
    labels: Tensor | None = None,
    batch_size: int = 100,
) -> Agreement:
    """Compare the outputs of a model that was read from a file with the simulation.

    Raises:
        ValueError: there are no inputs.
    """
    arguments = Arguments.of(inputs)
    if not arguments.size:
        raise ValueError("compare: there are no inputs")
    tally = _Tally()
    with torch.no_grad():
        for part, wanted in _batches(arguments, labels, batch_size):
            ours, theirs = _tensors(part.call(model)), _tensors(part.call(prepared.model))
            tally.decide(ours, theirs, part.size, wanted)
            tally.output(ours, theirs)
    return tally.result()


def _batches(
    arguments: Arguments, labels: Tensor | None, count: int
) -> Iterator[tuple[Arguments, Tensor | None]]:
    parts = list(arguments.split(count))
    return zip(parts, [None] * len(parts) if labels is None else labels.split(count), strict=True)


def feed_of(exported: Exported, arguments: Arguments) -> dict[str, Any]:
    """Return the inputs of onnxruntime for a batch."""
    names = exported.program.keywords
    kwargs = {name: arguments.kwargs[name] for name in names if name in arguments.kwargs}
    tensors = Arguments(arguments.args, {**kwargs, **arguments.kwargs}).tensors
    return {name: x.contiguous().numpy() for name, x in zip(exported.inputs, tensors, strict=True)}


def _compare_batch(
    exported: Exported, file: Any, watched: Any, part: Arguments, labels: Tensor | None, tally: _Tally
) -> None:
    feed, program, grids = feed_of(exported, part), exported.program, exported.grids
    end = [torch.from_numpy(value) for value in file.run(exported.outputs, feed)]
    actual = watched.run(None, feed)
    outputs = [torch.from_numpy(value) for value in actual[: len(end)]]
    codes = dict(zip(exported.quantized, actual[len(end) :], strict=True))
    calls = _Calls()

    def alone(key: int, x: Tensor) -> Tensor:
        grid = grids[key]
        return x if grid is None else grid.quantize(x)

    def behind_the_file(key: int, x: Tensor) -> Tensor:
        mark, grid = program.marks[key], grids[key]
        if grid is None or mark.kind in ("weight", "bias"):
            return alone(key, x)
        name = occurrence(mark.name, calls.number(mark.name, x))
        if name not in codes:
            return alone(key, x)
        theirs = torch.from_numpy(codes[name].astype("int32"))
        tally.code(name, theirs, _codes(x, grid))
        return (theirs - grid.zero_point) * grid.scale

    tally.decide(end, _tensors(program.run(part, alone)), part.size, labels)
    tally.output(outputs, _tensors(program.run(part, behind_the_file)))


class _Calls:
    """Numbers the tensors that reach a quantizer; a repeated tensor keeps its number."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[Tensor, int]]] = {}

    def number(self, name: str, x: Tensor) -> int:
        """Return the number of a tensor among those of a name, starting at 1."""
        seen = self._seen.setdefault(name, [])
        for i, (other, version) in enumerate(seen):
            if other is x and version == x._version:  # not changed in place
                return i + 1
        seen.append((x, x._version))
        return len(seen)


def _codes(x: Tensor, grid: Grid) -> Tensor:
    codes = (x / grid.scale).round() + grid.zero_point
    return codes.clamp(grid.q_min, grid.q_max).int()


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


class _Tally:
    """Accumulates the comparison over batches."""

    def __init__(self) -> None:
        self.inputs = self.same = self.codes = self.differing = self.count = 0
        self.where, self.apart, self.end_to_end, self.largest = "", 0.0, 0.0, 0.0
        self.right: tuple[int, int] | None = None  # correct decisions of the file and of the simulation

    def decide(
        self, ours: list[Tensor], theirs: list[Tensor], size: int, labels: Tensor | None = None
    ) -> None:
        """Count equal and correct decisions by the first output, and record the difference of outputs."""
        self.inputs += size
        mine, other = (
            x[0].reshape(size, -1) if len(x[0]) == size else x[0].reshape(1, -1) for x in (ours, theirs)
        )
        same = (_is_largest(mine) & _is_largest(other)).any(1)
        self.same += int(same.sum()) * size // len(same)
        if labels is not None:
            before = self.right or (0, 0)
            mine_right, other_right = (int((x.argmax(1) == labels).sum()) for x in (mine, other))
            self.right = before[0] + mine_right, before[1] + other_right
        self.end_to_end = max(self.end_to_end, _apart(ours, theirs))

    def output(self, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Record the difference of outputs; NaN counts as infinite."""
        self.apart = max(self.apart, _apart(ours, theirs))
        self.largest = max(self.largest, *(float(x.abs().max()) for x in theirs))

    def code(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        """Record the difference of codes."""
        apart = (ours - theirs).abs()
        self.count += apart.numel()
        self.differing += int((apart > 0).sum())
        if int(apart.max()) > self.codes or not self.where:
            self.codes, self.where = int(apart.max()), name

    def result(self) -> Agreement:
        """Return the result."""
        scale = self.largest or 1.0
        right = [None, None] if self.right is None else [100 * count / self.inputs for count in self.right]
        return Agreement(
            inputs=self.inputs,
            codes=self.codes,
            where=self.where,
            differing=self.differing / max(self.count, 1),
            outputs=self.apart / scale,
            top_1=self.same / self.inputs,
            end_to_end=self.end_to_end / scale,
            accuracy=right[0],
            expected=right[1],
        )


def _is_largest(outputs: Tensor) -> Tensor:
    """Return where each row has its largest value, which may be in several places."""
    return outputs == outputs.amax(1, keepdim=True)


def _apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max()) for a, b in pairs)


def _with_outputs(exported: Exported) -> bytes:
    """Return the file with the codes of activations as additional outputs."""
    helper, types = onnx().helper, onnx().TensorProto
    proto = onnx().load_from_string(exported.data)
    keys = exported.program.activations
    for name, codes in exported.quantized.items():
        grid = exported.grids[keys[name.partition(" (")[0]]]
        if grid is not None and grid.bits < 8:  # numpy has no narrower type
            proto.graph.node.append(helper.make_node("Cast", [codes], [f"{codes}.wide"], to=types.UINT8))
            codes = f"{codes}.wide"
        proto.graph.output.append(onnx().ValueInfoProto(name=codes))
    return bytes(proto.SerializeToString())
