"""The demo's results as one HTML page that needs nothing beside it, and as JSON."""

from __future__ import annotations

from pathlib import Path
from string import Template

from gradl1_fast import _json
from gradl1_fast._html import image, items, page, table
from gradl1_fast._plots import new_figure
from gradl1_fast.training.demo.charts import accuracy_chart, grids_chart, speed_chart
from gradl1_fast.training.demo.demo import PENALISED, PLAIN, Results, Settings, Spread
from gradl1_fast.training.demo.page import BODY, TITLE
from gradl1_fast.training.demo.speed import EAGER, OURS, OURS_STEP, Speed
from gradl1_fast.training.demo.speed import PLAIN as PLAIN_STEP

__all__ = ["accuracy_rows", "averaged", "html", "prepare", "speed_rows", "verdict", "write"]

Rows = list[tuple[str, ...]]


def prepare(folder: Path) -> None:
    """Make the folder, try to write to it and to draw, before any work is done.

    Raises:
        OSError: it cannot be made or written to.
        ImportError: matplotlib is not installed.
    """
    new_figure(1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".write-test"
    probe.touch()
    probe.unlink()


def write(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``results.json``; return their paths."""
    path, numbers = folder / "report.html", folder / "results.json"
    numbers.write_text(_json.dumps(results.to_dict(), indent=1) + "\n", encoding="utf-8")
    path.write_text(html(results), encoding="utf-8")
    return path, numbers


def accuracy_rows(results: Results) -> Rows:
    """Return bits, plain, penalised and gain, for equal bits of weights and activations."""
    rows: Rows = []
    for bits in results.settings.bits:
        gain = results.gain(bits, bits)
        rows.append(
            (
                "float" if bits is None else f"{bits}",
                str(results.spread(PLAIN, bits, bits)),
                str(results.spread(PENALISED, bits, bits)),
                gain.signed(),
                _ahead(gain),
            )
        )
    return rows


def speed_rows(speed: Speed) -> Rows:
    """Return kind of step, median time and ratio to the plain step."""
    return [(kind, f"{speed.median(kind):.1f} ms", f"{speed.ratio(kind):.2f}×") for kind in speed.times]


def averaged(results: Results) -> str:
    """Return over what the accuracies are averaged."""
    count = results.settings.seeds
    return "one pair of twins" if count == 1 else f"mean (worst to best) of {count} pairs"


def verdict(results: Results) -> list[str]:
    """Return the results in sentences."""
    lines = [_comparison(results, bits) for bits in (None, 8, 4, 3) if bits in results.settings.bits]
    gains = [results.gain(row.w, row.a) for row in results.tables[PLAIN][0].rows]
    worst, *_, best = sorted(gains, key=lambda gain: gain.mean)
    lines.append(
        f"Over all {len(gains)} pairs of widths, the mean gain ranges from {worst.signed()} to "
        f"{best.signed()} points."
    )
    return lines + [_cost(speed) for speed in results.speeds]


def _cost(speed: Speed) -> str:
    return (
        f"On {speed.network}, a penalised step takes {speed.ratio(OURS):.1f} times as long as a plain one "
        f"({speed.median(PLAIN_STEP):.1f} ms); {speed.ratio(OURS_STEP):.1f} times with scale='step', and "
        f"{speed.ratio(EAGER):.1f} times with ordinary double backprop."
    )


def html(results: Results) -> str:
    """Return the report."""
    settings = results.settings
    body = Template(BODY).substitute(
        verdict=items(verdict(results)),
        grids=image(grids_chart(results), "Accuracy over weight and activation bits", narrow=False),
        accuracy=image(accuracy_chart(results), "Accuracy of both kinds of network over bits"),
        speed=image(speed_chart(results.speeds), "Median time of a training step"),
        accuracy_table=table(
            ("bits", "plain, %", "penalised, %", "gain, points", "ahead in"), accuracy_rows(results)
        ),
        speed_tables="".join(
            table((speed.network, "median", "to plain"), speed_rows(speed)) for speed in results.speeds
        ),
        disagreement=f"{max(speed.disagreement for speed in results.speeds):.0e}",
        settings=table(("setting", "value"), _settings_rows(settings)),
        environment=table(
            ("what", "value"),
            [(name, value) for group in results.environment.values() for name, value in group.items()],
        ),
        averaged=averaged(results),
        epochs=settings.recipe.epochs,
        penalty_epochs=settings.recipe.penalty_epochs,
        coefficient=settings.recipe.coefficient,
        rounds=settings.rounds,
        minutes=f"{results.minutes:.1f}",
    )
    return page(TITLE, body)


def _settings_rows(settings: Settings) -> Rows:
    recipe = settings.recipe
    return [
        ("pairs", f"{settings.seeds}, with the seeds from 0"),
        (
            "data",
            "digits of scikit-learn: 1200 to train and calibrate, 597 to test; each seed has its own split",
        ),
        (
            "network",
            f"digits_net({settings.width}): a convolution and 4 depthwise-separable blocks, batch norm",
        ),
        ("training", f"{recipe.epochs} epochs in batches of {recipe.batch_size}"),
        ("optimizer", f"Adam, learning rate {recipe.learning_rate} with a cosine schedule to 0"),
        ("penalty", f"in the last {recipe.penalty_epochs} epochs, on weights and on activations"),
        ("coefficient", f"{recipe.coefficient}, scale={recipe.scale!r}"),
        ("weights' range", "symmetric, one for each tensor, from the largest absolute value"),
        ("activations' range", "affine, one for each tensor, from the extremes on the training images"),
        (
            "step times",
            f"median of {settings.rounds} alternating steps of each kind; both terms of the penalty",
        ),
    ]


def _comparison(results: Results, bits: int | None) -> str:
    name = "Float" if bits is None else f"{bits}-bit weights and activations"
    plain, penalised = (results.spread(kind, bits, bits).mean for kind in (PLAIN, PENALISED))
    gain = results.gain(bits, bits)
    ahead = f"penalised ahead in {_ahead(gain)} pairs"
    return f"{name}: plain {plain:.1f} %, penalised {penalised:.1f} % ({gain.signed()} points; {ahead})."


def _ahead(gain: Spread) -> str:
    return f"{sum(value > 0 for value in gain.values)} of {len(gain.values)}"
