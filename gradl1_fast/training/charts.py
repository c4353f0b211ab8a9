"""The charts of the demo's report, as SVG. Needs matplotlib."""

from __future__ import annotations

import io
from typing import Any

from gradl1_fast.quantization.plots import new_figure
from gradl1_fast.training.demo import PENALISED, PLAIN, Results
from gradl1_fast.training.speed import Speed

__all__ = ["accuracy_chart", "grids_chart", "speed_chart"]

COLOURS = {PLAIN: "#d95f02", PENALISED: "#1b6ca8"}
_STEP_COLOURS = ("#9aa5b1", "#d95f02", "#1b6ca8", "#7fb3d5")


def grids_chart(results: Results) -> str:
    """Return heat maps over bits of both kinds of network, with one colour scale, and of the difference."""
    bits = results.settings.bits
    figure = new_figure(12.4, 4.5)
    figure.get_layout_engine().set(wspace=0.04)
    plain, penalised, difference = figure.subplots(1, 3, sharey=True)
    for axes, kind in ((plain, PLAIN), (penalised, PENALISED)):
        values = [[results.spread(kind, w, a).mean for a in bits] for w in bits]
        picture = _heat_map(axes, values, bits, (0, 100), "viridis", False, f"{kind}: accuracy in %")
    figure.colorbar(picture, ax=[plain, penalised], shrink=0.8, pad=0.02)
    gains = [[results.gain(w, a).mean for a in bits] for w in bits]
    end = max(1.0, *(abs(value) for row in gains for value in row))
    title = "penalised minus plain, in points"
    picture = _heat_map(difference, gains, bits, (-end, end), "PuOr", True, title)
    figure.colorbar(picture, ax=difference, shrink=0.8, pad=0.04)
    plain.set_ylabel("weight bits")
    return _svg(figure)


def accuracy_chart(results: Results) -> str:
    """Return the accuracy over equal bits of weights and activations: means, and bands from worst to best."""
    bits = results.settings.bits
    figure = new_figure(8.2, 4.2)
    axes = figure.subplots()
    for kind, colour in COLOURS.items():
        spreads = [results.spread(kind, b, b) for b in bits]
        places = range(len(bits))
        lows, highs = [min(s.values) for s in spreads], [max(s.values) for s in spreads]
        axes.fill_between(places, lows, highs, color=colour, alpha=0.18, linewidth=0)
        axes.plot(places, [s.mean for s in spreads], color=colour, marker="o", linewidth=2, label=kind)
    axes.set_xticks(range(len(bits)), _names(bits))
    axes.set_xlabel("bits of weights and of activations")
    axes.set_ylabel("test accuracy in %")
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color="#e3e6ea")
    axes.legend(frameon=False, loc="lower left")
    _tidy(axes)
    return _svg(figure)


def speed_chart(speeds: list[Speed]) -> str:
    """Return bars of the median step times, with their ratio to the plain step."""
    figure = new_figure(8.2, 2.1 * len(speeds) + 0.2)
    figure.get_layout_engine().set(hspace=0.12)
    for axes, speed in zip(figure.subplots(len(speeds), squeeze=False)[:, 0], speeds, strict=True):
        kinds = list(speed.times)
        medians = [speed.median(kind) for kind in kinds]
        axes.barh(kinds, medians, color=_STEP_COLOURS, height=0.65)
        for place, kind in enumerate(kinds):
            text = f" {medians[place]:.1f} ms   {speed.ratio(kind):.1f}×"
            axes.text(medians[place], place, text, va="center")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(medians))
        axes.set_title(speed.network, loc="left", fontsize=10)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        _tidy(axes)
    return _svg(figure)


def _heat_map(
    axes: Any,
    values: list[list[float]],
    bits: tuple[int | None, ...],
    limits: tuple[float, float],
    colours: str,
    signed: bool,
    title: str,
) -> Any:
    """Draw values over weight bits (down) and activation bits (across); return what a colour bar needs."""
    picture = axes.pcolormesh(
        values, vmin=limits[0], vmax=limits[1], cmap=colours, edgecolors="white", linewidth=1
    )
    for down, row in enumerate(values):
        for across, value in enumerate(row):
            ink = "white" if _is_dark(picture.cmap(picture.norm(value))) else "black"
            axes.text(across + 0.5, down + 0.5, _text(value, signed), ha="center", va="center",
                      color=ink, fontsize=9)  # fmt: skip
    ticks = [place + 0.5 for place in range(len(bits))]
    axes.set_xticks(ticks, _names(bits))
    axes.set_yticks(ticks, _names(bits))
    axes.set_ylim(len(bits), 0)
    axes.set_xlabel("activation bits")
    axes.set_title(title, fontsize=11)
    axes.tick_params(length=0)
    return picture


def _text(value: float, signed: bool) -> str:
    rounded = round(value)  # an int: there is no -0
    return f"{rounded:+d}" if signed and rounded else f"{rounded}"


def _is_dark(colour: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def _names(bits: tuple[int | None, ...]) -> list[str]:
    return ["float" if b is None else str(b) for b in bits]


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Any) -> str:
    """Return a figure as the text of an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
