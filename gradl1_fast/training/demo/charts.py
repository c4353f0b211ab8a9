"""The charts of the demo's report, as SVG. Needs matplotlib."""

from __future__ import annotations

from gradl1_fast._plots import heat_map, new_figure, svg, tidy, width_name
from gradl1_fast.training.demo.demo import PENALISED, PLAIN, Results
from gradl1_fast.training.demo.speed import Speed

__all__ = ["accuracy_chart", "grids_chart", "speed_chart"]

COLOURS = {PLAIN: "#d95f02", PENALISED: "#1b6ca8"}
_STEP_COLOURS = ("#9aa5b1", "#d95f02", "#1b6ca8", "#7fb3d5")


def grids_chart(results: Results) -> str:
    """Return heat maps over bits of both kinds of network, with one colour scale, and of the difference."""
    bits = results.settings.bits
    widths = [(w, a) for w in bits for a in bits]
    figure = new_figure(12.4, 4.5)
    figure.get_layout_engine().set(wspace=0.04)
    plain, penalised, difference = figure.subplots(1, 3, sharey=True)
    for axes, kind in ((plain, PLAIN), (penalised, PENALISED)):
        values = {(w, a): results.spread(kind, w, a).mean for w, a in widths}
        picture = heat_map(axes, values, limits=(0, 100), form="{:.0f}", title=f"{kind}: accuracy in %")
    figure.colorbar(picture, ax=[plain, penalised], shrink=0.8, pad=0.02)
    gains = {(w, a): results.gain(w, a).mean for w, a in widths}
    end = max(1.0, *map(abs, gains.values()))
    title = "penalised minus plain, in points"
    picture = heat_map(difference, gains, limits=(-end, end), colours="PuOr", form="{:+.0f}", title=title)
    figure.colorbar(picture, ax=difference, shrink=0.8, pad=0.04)
    plain.set_ylabel("weight bits")
    return svg(figure)


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
    axes.set_xticks(range(len(bits)), map(width_name, bits))
    axes.set_xlabel("bits of weights and of activations")
    axes.set_ylabel("test accuracy in %")
    axes.set_ylim(0, 102)
    axes.grid(axis="y", color="#e3e6ea")
    axes.legend(frameon=False, loc="lower left")
    tidy(axes)
    return svg(figure)


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
        tidy(axes)
    return svg(figure)
