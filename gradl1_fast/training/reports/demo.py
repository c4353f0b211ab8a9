"""The results of ``gradl1 demo`` as one HTML page, as JSON, and as lines to print."""

from __future__ import annotations

from pathlib import Path

from gradl1_fast import _json
from gradl1_fast._report import charts, palette
from gradl1_fast._report.figures import width_name
from gradl1_fast._report.page import Chart, Report, Section, Table, Tile
from gradl1_fast._report.page import write as write_page
from gradl1_fast.training.demo.demo import PENALISED, PLAIN, Results, Settings, Spread
from gradl1_fast.training.demo.speed import EAGER, OURS, OURS_STEP, Speed
from gradl1_fast.training.demo.speed import PLAIN as PLAIN_STEP
from gradl1_fast.training.reports.common import TILES, pair_name, settings_and_versions

__all__ = ["accuracy_rows", "averaged", "report", "speed_rows", "verdict", "write"]

Rows = list[tuple[str, ...]]
_STEP_COLOURS = {
    **{PLAIN_STEP: palette.PLAIN, EAGER: palette.EAGER},
    **{OURS: palette.PENALISED, OURS_STEP: palette.PENALISED},
}


def write(results: Results, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``results.json``; return their paths."""
    path, numbers = folder / "report.html", folder / "results.json"
    numbers.write_text(_json.dumps(results.to_dict(), indent=1) + "\n", encoding="utf-8")
    write_page(path, report(results))
    return path, numbers


def report(results: Results) -> Report:
    """Return the report."""
    return Report(
        title="One network, any bit width",
        lead="Twin networks, trained on handwritten digits with and without the gradient-l1 penalty, then "
        "quantized on demand.",
        tiles=[_tile(results, bits) for bits in TILES if bits in results.settings.bits],
        charts=[_lines(results), _heat(results)],
        sections=[
            Section("Results in words", items=verdict(results)),
            Section("Procedure", text=_procedure(results.settings)),
            _accuracy(results),
            _cost(results.speeds),
            Section("Limits of this demo", text=[_LIMITS]),
            settings_and_versions(_settings_rows(results.settings), results.environment),
        ],
        footer=f"Written by gradl1 demo in {results.minutes:.1f} minutes. All numbers are in results.json.",
    )


def accuracy_rows(results: Results) -> Rows:
    """Return bits, plain, penalised and gain, for equal bits of weights and activations."""
    rows: Rows = []
    for bits in results.settings.bits:
        gain = results.gain(bits, bits)
        spreads = (str(results.spread(kind, bits, bits)) for kind in (PLAIN, PENALISED))
        rows.append((width_name(bits), *spreads, gain.signed(), _ahead(gain)))
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
    lowest, *_, highest = sorted(gains, key=lambda gain: gain.mean)
    lines.append(
        f"Over all {len(gains)} pairs of widths, the mean gain ranges from {lowest.signed()} to "
        f"{highest.signed()} points."
    )
    return lines + [_cost_in_words(speed) for speed in results.speeds]


def _cost_in_words(speed: Speed) -> str:
    return (
        f"On {speed.network}, a penalised step takes {speed.ratio(OURS):.1f} times as long as a plain one "
        f"({speed.median(PLAIN_STEP):.1f} ms); {speed.ratio(OURS_STEP):.1f} times with scale='step', and "
        f"{speed.ratio(EAGER):.1f} times with ordinary double backprop."
    )


def _comparison(results: Results, bits: int | None) -> str:
    name = "Float" if bits is None else f"{bits}-bit weights and activations"
    plain, penalised = (results.spread(kind, bits, bits).mean for kind in (PLAIN, PENALISED))
    gain = results.gain(bits, bits)
    ahead = f"penalised ahead in {_ahead(gain)} pairs"
    return f"{name}: plain {plain:.1f} %, penalised {penalised:.1f} % ({gain.signed()} points; {ahead})."


def _ahead(gain: Spread) -> str:
    return f"{sum(value > 0 for value in gain.values)} of {len(gain.values)}"


def _tile(results: Results, bits: int | None) -> Tile:
    plain, penalised = (results.spread(kind, bits, bits).mean for kind in (PLAIN, PENALISED))
    gain = results.gain(bits, bits)
    single = len(gain.values) == 1
    seeds = "one pair" if single else f"ahead in {_ahead(gain)} pairs"
    note = f"penalised; plain {plain:.1f} %: {gain.signed()} points, {seeds}"
    return Tile(f"Accuracy, {pair_name(bits, bits)}", f"{penalised:.1f} %", note, single)


def _lines(results: Results) -> Chart:
    bits, styles = results.settings.bits, palette.styles((PLAIN, PENALISED))
    plain, penalised = ([results.spread(kind, b, b).values for b in bits] for kind in (PLAIN, PENALISED))
    series = [
        charts.Series(PLAIN, styles[PLAIN], plain),
        charts.Series(PENALISED, styles[PENALISED], penalised, [results.gain(b, b).values for b in bits]),
    ]
    return Chart(
        charts.lines(series, list(map(width_name, bits)), "plain"),
        "Accuracy over bit widths",
        f"Weights and activations at the same width; {averaged(results)}. Below: penalised minus plain with "
        "the same seed; dots are pairs. Chance is 10 %.",
        charts.keys(series),
    )


def _heat(results: Results) -> Chart:
    bits = results.settings.bits
    names = list(map(width_name, bits))
    gains = {(width_name(w), width_name(a)): results.gain(w, a).mean for w in bits for a in bits}
    return Chart(
        charts.differences(gains, names, names, ("weight bits", "activation bits")),
        "Penalised minus plain at every pair of widths, in points",
        "Means over the pairs. Blue: the penalised network is more accurate; orange: less. Cells without a "
        "number differ by less than half a point.",
        scrolls=True,
    )


def _accuracy(results: Results) -> Section:
    bits = results.settings.bits
    everything = range(len(bits)) if results.settings.seeds == 1 else ()
    grids = [
        Table(
            (f"{kind}: weight bits", *(f"a {width_name(a)}" for a in bits)),
            [(width_name(w), *(f"{results.spread(kind, w, a).mean:.1f}" for a in bits)) for w in bits],
            frozenset(everything),
        )
        for kind in (PLAIN, PENALISED)
    ]
    header = ("bits", "plain, %", "penalised, %", "gain, points", "ahead in")
    equal = Table(header, accuracy_rows(results), frozenset(everything))
    text = f"Test accuracy in percent: {averaged(results)} at equal widths, then means at every pair."
    return Section("Accuracy in numbers", text=[text], tables=[equal, *grids])


def _cost(speeds: list[Speed]) -> Section:
    figures = []
    for speed in speeds:
        texts = {kind: f"{speed.median(kind):.1f} ms, {speed.ratio(kind):.1f}×" for kind in speed.times}
        medians = {kind: speed.median(kind) for kind in speed.times}
        figures.append(Chart(charts.bars(medians, _STEP_COLOURS, texts=texts), _capital(speed.network)))
    tables = [Table((_capital(speed.network), "median", "to plain"), speed_rows(speed)) for speed in speeds]
    disagreement = max(speed.disagreement for speed in speeds)
    same = f"The relative difference between the two penalties is {disagreement:.0e}."
    text = f"{_COST} {same if disagreement else 'The two penalties are equal.'}"
    return Section("Cost of a training step", text=[text], charts=figures, tables=tables)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _procedure(settings: Settings) -> list[str]:
    recipe = settings.recipe
    return [
        _FIRST_ORDER,
        f"Each pair starts from the same weights and sees the same batches for {recipe.epochs} epochs. In "
        f"the last {recipe.penalty_epochs} of these, the penalised twin adds {recipe.coefficient} "
        "times the l1 norms, each multiplied by the step of its tensor at 4 bits, to the loss. Nothing was "
        "trained after quantization; each network uses a single set of weights for all widths.",
    ]


def _settings_rows(settings: Settings) -> list[tuple[str, str]]:
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
        (
            "penalty",
            f"in the last {recipe.penalty_epochs} of {recipe.epochs} epochs, on weights and on activations",
        ),
        ("coefficient", f"{recipe.coefficient}, scale={recipe.scale!r}"),
        ("weights' range", "symmetric, one for each tensor, from the largest absolute value"),
        ("activations' range", "affine, one for each tensor, from the extremes on the training images"),
        (
            "step times",
            f"median of {settings.rounds} alternating steps of each kind; both terms of the penalty",
        ),
    ]


_FIRST_ORDER = (
    "Quantization rounds each weight and each activation to one of a few values: 256 at 8 bits, 8 at 3 "
    "bits. No value moves by more than half a step unless it is clipped. To first order, the loss "
    "therefore changes by at most half a step times the l1 norm of its gradient, the sum of the absolute "
    "values. Training that keeps this norm small should give a network that is robust to rounding at any "
    "width, without training at one."
)
_COST = (
    "Ordinary double backprop (torch.autograd.grad with create_graph=True, on the unconverted network) is "
    "compared with this library, which computes the same penalty. Only the epochs with the penalty have "
    'this cost. With scale="step", as in the demo, a step also measures the range of each tensor. In '
    "small networks the overhead of each operation dominates, in larger ones the arithmetic."
)
_LIMITS = (
    "Digits of 8x8 pixels are easy, the test set is small (one image is 0.17 %), and the coefficient and "
    "the number of epochs were chosen by looking at this data set. Depthwise-separable networks, as used "
    "on phones, are known to suffer most from quantization; ordinary convolutional networks lose less on "
    "digits and have less to gain. The times are from this computer and this run."
)
