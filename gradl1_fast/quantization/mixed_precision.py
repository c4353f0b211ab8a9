"""Mixed precision: a width per tensor under a budget, chosen greedily by sensitivity and evaluated."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradl1_fast import _checks as check
from gradl1_fast._progress import track
from gradl1_fast._report import palette
from gradl1_fast._report.figures import new_figure, save, tidy
from gradl1_fast._shown import Grid, Shown
from gradl1_fast.quantization._modes import Forward
from gradl1_fast.quantization.bits import INPUT_BITS, bits, check_width, set_bits, widths_of
from gradl1_fast.quantization.costs import Costs, costs
from gradl1_fast.quantization.sensitivity import Sensitivity, sensitivity, site_widths

__all__ = ["Plan", "Point", "search"]

Key = tuple[str, str]  # kind "w" or "a", and name
State = dict[Key, int]
Keys = dict[Key, list[int]]  # the choices, from the widest to the narrowest
_POINTS = 12


@dataclass(frozen=True)
class Point:
    """An evaluated choice of widths.

    Attributes:
        w: bits of the weights, by layer.
        a: bits of the activations, by site; empty if they keep their widths.
        cost: bytes, or bit operations for one example.
        estimate: sum of the losses of single tensors, in units of ``value``.
        value: the result of ``evaluate``.
        uniform: whether all tensors have the same width, except the network's input.
    """

    w: dict[str, int]
    a: dict[str, int]
    cost: float
    estimate: float
    value: float
    uniform: bool


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The result of :func:`search`; ``print``, or a notebook, shows its points and the best widths as tables.

    Attributes:
        best: the best point within the budget; the cheapest one if several have the same value.
        points: all evaluated points, by decreasing cost.
        budget: the maximum cost of ``best``.
        unit: the unit of cost and budget.
        float_value: the result of ``evaluate`` in float.
        higher_is_better: whether a larger ``value`` is better.
    """

    best: Point
    points: list[Point]
    budget: float
    unit: str
    float_value: float
    higher_is_better: bool

    def pareto(self) -> list[Point]:
        """Return the Pareto-optimal points in cost and value, by decreasing cost."""
        sign = 1 if self.higher_is_better else -1
        front: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.cost, -sign * p.value)):
            if not front or sign * point.value > sign * front[-1].value:
                front.append(point)
        return front[::-1]

    def apply(self, model: nn.Module) -> None:
        """Set the widths of :attr:`best`."""
        set_bits(model, w=self.best.w, a=self.best.a)

    def _parts(self) -> Iterator[Grid | str]:
        yield Grid((self.unit, "value", "widths", ""), self._rows(), right=(0, 1))
        yield f"float: {self.float_value:.4f}, budget: {self.budget:,.0f} {self.unit}"
        widths = [("w", name, str(width)) for name, width in self.best.w.items()]
        widths += [("a", name, str(width)) for name, width in self.best.a.items()]
        yield Grid(("kind", "name", "bits"), widths, "Best within the budget", right=(2,))

    def _rows(self) -> list[tuple[str, ...]]:
        front = set(map(id, self.pareto()))
        rows: list[tuple[str, ...]] = []
        for point in self.points:
            widths = f"all {min(point.w.values())}" if point.uniform else "mixed"
            marks = ["pareto"] * (id(point) in front) + ["best within the budget"] * (point is self.best)
            rows.append((f"{point.cost:,.0f}", f"{point.value:.4f}", widths, ", ".join(marks)))
        return rows

    def plot(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Draw value over cost into an image file; needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        save(self.figure(title=title), path)

    def figure(self, *, title: str = "") -> Any:
        """Return a figure of value over cost; needs matplotlib."""
        figure = new_figure(6, 4)
        axes = figure.subplots()
        front = self.pareto()
        axes.plot([p.cost for p in front], [p.value for p in front], color="0.7", zorder=0)
        for uniform, label in ((False, "mixed"), (True, "one width for all")):
            shown = [p for p in self.points if p.uniform is uniform]
            colour = palette.OTHERS[2 if uniform else 0]
            axes.scatter([p.cost for p in shown], [p.value for p in shown], color=colour, label=label)
        axes.axvline(self.budget, color="black", linestyle=":", label="budget")
        axes.axhline(self.float_value, color="black", linewidth=0.8, label="float")
        axes.set_xlabel(self.unit)
        axes.set_title(title, fontsize=11)
        axes.legend(fontsize=8, frameon=False)
        tidy(axes)
        return figure


def search(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    size: float | None = None,
    bit_operations: float | None = None,
    example: Any = None,
    forward: Forward | None = None,
    choices: Sequence[int] = (8, 6, 5, 4, 3, 2),
    input_bits: int | None = INPUT_BITS,
    higher_is_better: bool = True,
    progress: bool = True,
) -> Plan:
    """Choose a width for each tensor under a budget.

    First, each tensor is quantized alone at every width, see :func:`gradl1_fast.sensitivity`. Starting with
    the widest choice, the search then repeatedly narrows the tensor with the smallest loss per saved cost.
    It evaluates choices along this path, the first choice within the budget, and uniform widths, and returns
    the best one within the budget. A smooth value such as the mean loss orders the steps better than an
    accuracy, which hides small losses.

    Args:
        model: a converted model, calibrated if activations are quantized, in the mode in which it is to be
            evaluated.
        evaluate: takes the model and returns a number.
        size: budget for the bytes of the weights, as counted by :func:`gradl1_fast.costs`. Activations keep
            their widths.
        bit_operations: budget for the sum over all products of weight bits times input bits, for one
            example; the search chooses the widths of weights and activations. Give this or ``size``.
        example: a batch as for :func:`gradl1_fast.calibrate`, required with ``bit_operations``.
        forward: runs the model on the example, as for :func:`gradl1_fast.calibrate`.
        choices: widths to choose from.
        input_bits: minimum bits of the network's input, None keeps it in float; see
            :func:`gradl1_fast.set_bits`.
        higher_is_better: whether a larger result of ``evaluate`` is better; False for a loss.
        progress: show progress bars in a terminal if rich is installed.

    Returns:
        The best point and all evaluated points. :meth:`Plan.apply` sets the widths; until then the model
        keeps its widths.

    Raises:
        TypeError: a width is not an int, or a budget is not a number.
        ValueError: both budgets or neither are given, the budget is below the cost of the narrowest choice, a
            width is out of range, or ``evaluate`` returned NaN.
        RuntimeError: an activation has no range yet.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> layers = [torch.nn.Linear(8, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 8, bias=False)]
        >>> model = gl.convert(torch.nn.Sequential(*layers)).eval()
        >>> x = torch.randn(32, 8)
        >>> y = model(x).detach()
        >>> def error(model):
        ...     return float((model(x) - y).detach().square().mean())
        >>> plan = gl.search(model, error, size=80, higher_is_better=False)  # bytes; at 8 bits it takes 128
        >>> gl.costs(model).size(plan.best.w) <= 80
        True
        >>> plan.apply(model)
    """
    if (size is None) == (bit_operations is None):
        raise ValueError("search: give exactly one budget: size (in bytes) or bit_operations")
    if bit_operations is not None and example is None:
        raise ValueError("search: bit_operations needs an example, to count multiplications")
    widths = _widths(choices)
    budget = check.coefficient("search: budget", size if bit_operations is None else bit_operations)
    unit = "bytes" if bit_operations is None else "bit operations"
    check_width("search: input_bits", input_bits)
    table = costs(model, example if bit_operations is not None else None, forward=forward)
    price = _price(table, unit)
    keys: Keys = {("w", name): widths for name in table.weights}
    if bit_operations is not None:
        sites = site_widths(model, widths, input_bits)
        keys |= {("a", name): tried for name, tried in sites.items() if tried}
    least = price({key: tried[-1] for key, tried in keys.items()})
    if least > budget:
        raise ValueError(
            f"search: the narrowest choice costs {least:,.0f} {unit}, more than the budget of {budget:,.0f}"
        )
    activations = () if bit_operations is None else widths

    def number(model: nn.Module) -> float:
        value = check.number("search: evaluate", evaluate(model))
        if math.isnan(value):  # NaN compares false, and would count as no loss
            w, a = ({n: b for n, b in widths.items() if b is not None} for widths in widths_of(model))
            raise ValueError(f"search: evaluate returned NaN at w = {w}, a = {a}, everything else in float")
        return value

    losses = sensitivity(model, number, w=widths, a=activations, input_bits=input_bits, progress=progress)
    loss = _losses(losses, keys, 1 if higher_is_better else -1)
    uniform = [_uniform(keys, width) for width in widths]
    states = _to_evaluate(_path(keys, loss, price), uniform, price, budget)
    points = []
    for state in track(states, "verify", show=progress):
        w, a = ({name: b for (kind, name), b in state.items() if kind == k} for k in "wa")
        with bits(model, w=w, a=a):
            value = number(model)
        estimate = sum(loss[key][b] for key, b in state.items())
        points.append(Point(w, a, price(state), estimate, value, state in uniform))
    points.sort(key=lambda p: -p.cost)
    within = [
        p for p in reversed(points) if p.cost <= budget
    ]  # max returns the first, that is the cheapest, of equal values
    best = max(within, key=lambda p: p.value if higher_is_better else -p.value)
    return Plan(best, points, budget, unit, losses.float_value, higher_is_better)


def _widths(choices: Sequence[int]) -> list[int]:
    for width in choices:
        if width is None:
            raise TypeError("search: choices must be numbers of bits, got None")
        check_width("search: choices", width)
    if not choices:
        raise ValueError("search: choices is empty; give widths such as (8, 4, 2)")
    return sorted(set(choices), reverse=True)


def _price(table: Costs, unit: str) -> Callable[[State], float]:
    def price(state: Mapping[Key, int]) -> float:
        w: dict[str, int | None] = {name: b for (kind, name), b in state.items() if kind == "w"}
        if unit == "bytes":
            return table.size(w)
        return table.bit_operations(w, {name: b for (kind, name), b in state.items() if kind == "a"})

    return price


def _uniform(keys: Keys, width: int) -> State:
    """Return the same width for all tensors, with the minimum bits for the network's input."""
    return {key: width if width in tried else min(tried) for key, tried in keys.items()}


def _losses(sensitivities: Sensitivity, keys: Keys, sign: int) -> dict[Key, dict[int, float]]:
    """Return the loss of each tensor at each width, made monotone, since a decreasing loss is noise."""
    losses: dict[Key, dict[int, float]] = {}
    for key, widths in keys.items():
        worst = 0.0
        losses[key] = {}
        for width in widths:
            worst = max(worst, sign * (sensitivities.float_value - sensitivities[(*key, width)]))
            losses[key][width] = worst
    return losses


def _path(
    keys: Keys, loss: Mapping[Key, Mapping[int, float]], price: Callable[[State], float]
) -> list[State]:
    """Return the states from the widest to the narrowest; each differs from the last in one tensor."""
    state = {key: tried[0] for key, tried in keys.items()}
    states = [state]
    narrower = {key: dict(itertools.pairwise(tried)) for key, tried in keys.items()}
    while any(width in narrower[key] for key, width in state.items()):
        now = price(state)
        steps = []
        for key, width in state.items():
            if width in narrower[key]:
                saved = now - price({**state, key: narrower[key][width]})
                lost = loss[key][narrower[key][width]] - loss[key][width]
                # Changes without savings come last; among equals, the largest saving comes first.
                steps.append(((lost / saved if saved else float("inf")), -saved, key))
        _, _, key = min(steps)
        state = {**state, key: narrower[key][state[key]]}
        states.append(state)
    return states


def _to_evaluate(
    path: list[State], uniform: list[State], price: Callable[[State], float], budget: float
) -> list[State]:
    """Return states spread over the path, the first state within the budget, and the uniform states."""
    count = min(_POINTS, len(path))
    chosen = [path[round(i * (len(path) - 1) / max(count - 1, 1))] for i in range(count)]
    chosen.append(next(state for state in path if price(state) <= budget))
    chosen += uniform
    distinct = {tuple(state.items()): state for state in chosen}
    return list(distinct.values())
