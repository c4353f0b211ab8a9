"""Evaluation of a model at many widths."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast import _json
from gradl1_fast._progress import track
from gradl1_fast._report.figures import heat_map, new_figure, save, width_name
from gradl1_fast._shown import Grid, Shown
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.quantization._modes import lasting, moved
from gradl1_fast.quantization.bits import INPUT_BITS, bits, check_width
from gradl1_fast.quantization.freshness import warn_if_stale
from gradl1_fast.quantization.parallel import parallel_map
from gradl1_fast.quantization.reestimation import reestimate_batch_norm

__all__ = ["Row", "Table", "sweep"]

Width = tuple[int | None, int | None]


@dataclass(frozen=True)
class Row:
    """The result at one width.

    Attributes:
        w: bits of the weights, None for float.
        a: bits of the activations, None for float.
        value: the result of ``evaluate``.
    """

    w: int | None
    a: int | None
    value: float


class Table(Shown):
    """Results of a sweep; ``print``, or a notebook, shows them as a table.

    Attributes:
        rows: one :class:`Row` per width, in the requested order.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return iter(self.rows)

    def _parts(self) -> Iterator[Grid]:
        rows = [(width_name(row.w), width_name(row.a), f"{row.value:.4f}") for row in self.rows]
        yield Grid(("w", "a", "value"), rows, right=(0, 1))

    def __getitem__(self, width: Width) -> float:
        """Return the value at ``(w, a)``; KeyError if it was not evaluated."""
        for row in self.rows:
            if (row.w, row.a) == (tuple(width) if isinstance(width, list) else width):
                return row.value
        raise KeyError(f"no row for (w, a) = {width}; there are {[(r.w, r.a) for r in self.rows]}")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the columns w, a, value; a float width is an empty cell."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("w", "a", "value"))
            writer.writerows((_cell(row.w), _cell(row.a), row.value) for row in self.rows)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write a list of objects with the keys w, a and value.

        Float widths and values that are NaN or infinite, which JSON cannot represent, are null.
        """
        Path(path).write_text(_json.dumps([vars(row) for row in self.rows], indent=1) + "\n")

    def plot(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Plot the values over widths as a heat map to an image file; requires matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        widths = {row.w for row in self.rows}, {row.a for row in self.rows}
        figure = new_figure(1.6 + 0.75 * len(widths[1]), 1.3 + 0.5 * len(widths[0]))
        axes = figure.subplots()
        heat_map(axes, {(row.w, row.a): row.value for row in self.rows}, title=title)
        axes.set_ylabel("weight bits")
        save(figure, path)


def sweep(
    model: nn.Module,
    evaluate: Callable[..., Any],
    widths: Sequence[Width],
    *,
    batches: Iterable[Any] | None = None,
    input_bits: int | None = INPUT_BITS,
    reestimate: Iterable[Any] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Table:
    """Evaluate a model at each width and restore its widths.

    Quantization is simulated in floating point: an evaluation takes longer than in float. With one worker,
    widths are evaluated one after another, each with all of torch's threads. It warns if an evaluation
    changed the buffers of the model, as a batch norm in training mode does.

    Args:
        model: a converted, calibrated model, in the mode for evaluation.
        evaluate: takes the model and returns a number. With ``batches``, it takes the model and a batch and
            returns a sum and a count, such as correct answers and images; the result at a width is the
            total sum divided by the total count.
        widths: pairs ``(w, a)``; None stands for float.
        batches: data that are read once for all widths, which saves time if reading is slow. Tensors are
            moved to the device of the model.
        input_bits: minimum bits of the network input, see :func:`gradl1_fast.set_bits`; rows contain
            ``(w, a)`` as given.
        reestimate: batches for :func:`gradl1_fast.reestimate_batch_norm`, which is called at each width
            before the evaluation; the model keeps the result. None uses the statistics of the model.
        workers: number of widths evaluated at once, in threads that share the weights and divide torch's
            threads among them. Useful on many cores, for networks too small to use them all; ``evaluate``
            must then be thread-safe, and the model in evaluation mode. Not supported with ``batches``,
            where the widths take turns at each batch.
        progress: show a progress bar in a terminal if rich is installed.

    Raises:
        TypeError: a width is not a pair of numbers of bits, ``workers`` is not an int, ``reestimate`` is an
            iterator, or ``evaluate`` is not a function or does not return a number (a pair with ``batches``).
        ValueError: there is no width or no batch, a width or ``workers`` is out of range, or there are
            several workers and ``batches``, or a module in training mode.
        RuntimeError: an activation has no range yet.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> model = gl.convert(torch.nn.Sequential(torch.nn.Linear(4, 2))).eval()
        >>> x = torch.ones(1, 4)
        >>> gl.calibrate(model, [x])
        >>> table = gl.sweep(model, lambda m: 1.0, widths=[(None, None), (4, 8)])
        >>> print(table)
            w      a  value
        float  float  1.0000
            4      8  1.0000
        >>> table[4, 8]
        1.0
    """
    checked = [_pair(width) for width in widths]
    if not checked:
        raise ValueError("sweep: widths is empty; give pairs such as [(8, 8), (4, 4)]")
    if not callable(evaluate):
        raise TypeError(f"sweep: evaluate must be a function of the model, got {evaluate!r:.100}")
    check_width("sweep: input_bits", input_bits)
    if any(a is not None for _, a in checked):
        warn_if_stale(model)  # here, so that workers do not each warn
    if reestimate is not None:
        _reestimate(model, checked, input_bits, lasting("sweep: reestimate", reestimate), progress)
    before = [(name, buffer, buffer.clone()) for name, buffer in model.named_buffers()]
    run = _Run(model, evaluate, checked, input_bits)
    table = run.table(batches, workers, progress)
    changed = [name for name, buffer, value in before if not torch.equal(buffer, value)]
    if changed:
        warnings.warn(
            f"sweep: evaluate changed {check.some(changed)}: was the model in training mode, where batch "
            "norms use the batch and update their statistics? Call model.eval() first",
            stacklevel=2,
        )
    layers = named_layers(model)
    if layers and not any(layer.was_called for layer in layers.values()):
        warnings.warn(
            f"sweep: {check.some(list(layers))} were not called, so nothing was quantized: a function that "
            "uses the weight of a layer uses it in float",
            stacklevel=2,
        )
    return table


def _reestimate(
    model: nn.Module, widths: Sequence[Width], input_bits: int | None, batches: Iterable[Any], progress: bool
) -> None:
    for w, a in track(widths, "batch norms", total=len(widths), show=progress):
        with bits(model, w=w, a=a, input_bits=input_bits):
            if (w, a) != (None, None):
                reestimate_batch_norm(model, batches)


@dataclass(frozen=True)
class _Run:
    """The settings of a sweep.

    Attributes:
        model: the model.
        evaluate: the function that evaluates it.
        widths: the widths to evaluate.
        input_bits: minimum bits of the network's input.
    """

    model: nn.Module
    evaluate: Callable[..., Any]
    widths: Sequence[Width]
    input_bits: int | None

    def table(self, batches: Iterable[Any] | None, workers: int, progress: bool) -> Table:
        if check.count("sweep: workers", workers) > 1 and batches is not None:
            raise ValueError(
                "sweep: several workers cannot share batches; let evaluate load its data, or use workers=1"
            )
        if batches is not None:
            return self._one_pass(track(batches, "sweep", show=progress))
        if workers == 1:
            values: Iterable[float] = (self._value(self.model, width) for width in self.widths)
        else:
            values = parallel_map(self.model, self._value, self.widths, workers)
        shown = track(values, "sweep", total=len(self.widths), show=progress)
        return Table(Row(w, a, each) for (w, a), each in zip(self.widths, shown, strict=True))

    def _value(self, model: nn.Module, width: Width) -> float:
        with bits(model, w=width[0], a=width[1], input_bits=self.input_bits):
            return check.number("sweep: evaluate", self.evaluate(model))

    def _one_pass(self, batches: Iterable[Any]) -> Table:
        totals = [(0.0, 0.0)] * len(self.widths)
        for batch in batches:
            on_device = moved(self.model, batch)
            for i, (w, a) in enumerate(self.widths):
                with bits(self.model, w=w, a=a, input_bits=self.input_bits):
                    result = _sum_and_count(self.evaluate(self.model, on_device))
                totals[i] = totals[i][0] + result[0], totals[i][1] + result[1]
        if not totals[0][1]:
            raise ValueError("sweep: got no batches (an iterator can be used only once)")
        pairs = zip(self.widths, totals, strict=True)
        return Table(Row(w, a, total / count) for (w, a), (total, count) in pairs)


def _sum_and_count(result: Any) -> tuple[float, float]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(f"sweep: with batches, evaluate must return (sum, count), got {result!r}")
    return float(result[0]), float(result[1])


def _pair(width: Any) -> Width:
    if not isinstance(width, tuple | list) or len(width) != 2:
        raise TypeError(f"sweep: a width must be a pair (w, a), got {width!r}")
    check_width("w", width[0])
    check_width("a", width[1])
    return width[0], width[1]


def _cell(bits: int | None) -> int | str:
    return "" if bits is None else bits
