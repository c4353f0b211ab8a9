"""The sensitivity of a model to quantizing each weight and activation alone."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast._progress import track
from gradl1_fast._report import palette
from gradl1_fast._report.figures import new_figure, save, tidy
from gradl1_fast._shown import Grid, Shown
from gradl1_fast.conversion.by_function import quantizable_layers
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.quantization.bits import INPUT_BITS, bits, check_width, width_at

__all__ = ["Sensitivity", "SensitivityRow", "sensitivity", "site_widths"]


@dataclass(frozen=True)
class SensitivityRow:
    """The result with a single tensor quantized and all others in float.

    Attributes:
        kind: ``"w"`` for the weight of a layer, ``"a"`` for an activation.
        name: name of the layer or of the site.
        bits: bits of the tensor.
        value: the result of ``evaluate``.
    """

    kind: str
    name: str
    bits: int
    value: float

    @property
    def tensor(self) -> str:
        """Name of the tensor: that of the site, or ``<layer>.weight``."""
        return f"{self.name}.weight".removeprefix(".") if self.kind == "w" else self.name


class Sensitivity(Shown):
    """Results of :func:`sensitivity`; ``print``, or a notebook, shows them as a table.

    Attributes:
        rows: one row per tensor and width.
        float_value: the result of ``evaluate`` in float.
    """

    def __init__(self, rows: Iterable[SensitivityRow], float_value: float) -> None:
        self.rows = list(rows)
        self.float_value = float_value

    def __getitem__(self, key: tuple[str, str, int]) -> float:
        """Return the value at ``(kind, name, bits)``; KeyError if it was not evaluated."""
        for row in self.rows:
            if (row.kind, row.name, row.bits) == key:
                return row.value
        raise KeyError(f"no row for (kind, name, bits) = {key}")

    def _parts(self) -> Iterator[Grid | str]:
        rows = [
            (row.name, row.kind, str(row.bits), f"{row.value:.4f}", f"{row.value - self.float_value:+.4f}")
            for row in self.rows
        ]
        yield Grid(("name", "kind", "bits", "value", "change"), rows, right=(2, 3, 4))
        yield f"float: {self.float_value:.4f}"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the columns kind, name, bits, value; the float value is a row with only a value."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("kind", "name", "bits", "value"))
            writer.writerow(("", "", "", self.float_value))
            writer.writerows((r.kind, r.name, r.bits, r.value) for r in self.rows)

    def plot(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Plot a bar per tensor and width to an image file; requires matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        save(self.figure(title=title), path)

    def figure(self, *, title: str = "") -> Any:
        """Return a figure with the change from float, one bar per tensor and width; requires matplotlib."""
        names = list(dict.fromkeys(row.tensor for row in self.rows))
        widths = sorted({row.bits for row in self.rows}, reverse=True)
        figure = new_figure(8, 1.2 + 0.16 * len(names) * (len(widths) + 1))
        axes = figure.subplots()
        for i, width in enumerate(widths):
            shown = [row for row in self.rows if row.bits == width]
            positions = [names.index(r.tensor) + (i + 0.5) / (len(widths) + 1) for r in shown]
            changes = [r.value - self.float_value for r in shown]
            colour = palette.OTHERS[i % len(palette.OTHERS)]
            axes.barh(positions, changes, 0.9 / (len(widths) + 1), color=colour, label=f"{width} bits")
        axes.axvline(0, color="black", linewidth=0.8)
        centres = [i + 0.5 * len(widths) / (len(widths) + 1) for i in range(len(names))]
        axes.set_yticks(centres, [name.replace("$", r"\$") for name in names], fontsize=8)
        axes.set_ylim(len(names), 0)
        axes.set_xlabel("change from float, this tensor alone quantized")
        axes.set_title(title, fontsize=11)
        axes.legend(fontsize=8, frameon=False)
        tidy(axes)
        return figure


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    w: Sequence[int] = (4,),
    a: Sequence[int] = (4,),
    input_bits: int | None = INPUT_BITS,
    progress: bool = True,
) -> Sensitivity:
    """Evaluate a model for each tensor and width with only this tensor quantized.

    Args:
        model: a converted, calibrated model, in the mode for evaluation.
        evaluate: takes the model and returns a number.
        w: widths of the weights to evaluate; empty to skip weights. Weights that only functions read stay in
            float and are skipped.
        a: widths of the activations to evaluate; empty to skip activations. Sites that no value reached in
            calibration are skipped.
        input_bits: minimum bits of the network's input, None skips it; see :func:`gradl1_fast.set_bits`.
        progress: show a progress bar in a terminal if rich is installed.

    Returns:
        A row per tensor and width. The widths of the model are restored.

    Raises:
        TypeError: a width is not an int.
        ValueError: a width is out of range.
        RuntimeError: an activation has no range yet.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)]
        >>> model = gl.convert(torch.nn.Sequential(*layers))
        >>> x = torch.randn(16, 4)
        >>> gl.calibrate(model.eval(), [x])
        >>> alone = gl.sensitivity(model, lambda m: float(m(x).detach().sum()), w=(4, 2), a=(4,))
    """
    for kind, widths in (("w", w), ("a", a)):
        for width in widths:
            if width is None:
                raise TypeError(f"sensitivity: {kind}: float is always evaluated, give numbers of bits")
            check_width(f"sensitivity: {kind}", width)
    check_width("sensitivity: input_bits", input_bits)
    trials = [("w", name, b) for name in quantizable_layers(model) for b in w]
    trials += [("a", name, b) for name, tried in site_widths(model, a, input_bits).items() for b in tried]

    def found() -> float:
        return check.number("sensitivity: evaluate", evaluate(model))

    with bits(model, w=None, a=None):
        value = found()
        rows = []
        for kind, name, width in track(trials, "sensitivity", show=progress):
            one = {name: width}
            with bits(model, w=one if kind == "w" else {}, a=one if kind == "a" else {}):
                rows.append(SensitivityRow(kind, name, width, found()))
    return Sensitivity(rows, value)


def site_widths(model: nn.Module, a: Sequence[int], input_bits: int | None) -> dict[str, list[int]]:
    """Return the widths to evaluate at each site, in the order of ``a``.

    A site that no value reached in calibration has no widths, unless no site has a range; quantizing then
    raises an error.
    """
    sites = named_quantizers(model)
    some = any(quantizer.low is not None for quantizer in sites.values())
    widths: dict[str, list[int]] = {}
    for name, quantizer in sites.items():
        allowed = [] if some and quantizer.low is None else [width_at(quantizer, b, input_bits) for b in a]
        widths[name] = list(dict.fromkeys(b for b in allowed if b is not None))
    return widths
