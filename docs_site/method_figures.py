"""The charts of docs/results/methods.md: gains over plain training, and accuracy over training time."""

from __future__ import annotations

from docs_site import accuracy
from docs_site.methods_results import FREE_STEPS, PLAIN, WITHOUT_DATA, WORDS, Kept, names, value
from gradl1_fast._report import palette

__all__ = ["costs", "gains"]

NETWORK = "methods-fashion-mnist"
WIDTH = 3, 3
CLASSES = {WITHOUT_DATA: "ours", FREE_STEPS: "free"}
COLOURS = f"--plain: {palette.PLAIN}; --free: {palette.FREE}; --ours: {palette.PENALISED}"

_ROW, _LABELS, _PLOT, _TOP = 18, 170, 300, 44
_LEFT, _ACROSS, _HIGH = 44, 420, 240


def gains() -> str:
    """Return the difference from plain training at (3, 3), a row per method, with and without data."""
    kept = accuracy.read(NETWORK)
    rows = {method: _gains(kept, method) for method in names(kept) if method != PLAIN}
    ends = [gain for row in rows.values() for gain in row.values()]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    span = max(high - low, 1e-9)

    def x(gain: float) -> float:
        return _LABELS + _PLOT * (gain - low) / span

    bottom = _TOP + _ROW * len(rows)
    parts = [_rule(x(at), bottom, at) for at in _ticks(low, high)]
    for index, (method, row) in enumerate(sorted(rows.items(), key=lambda item: -item[1].get(FREE_STEPS, 0))):
        y = _TOP + _ROW * (index + 0.5)
        parts.append(f'<text x="{_LABELS - 10}" y="{y + 4:.1f}" text-anchor="end">{method}</text>')
        parts += [_dot(x(gain), y, regime, f"{method}: {gain:+.1f} points") for regime, gain in row.items()]
    parts += [_key(i, WORDS[regime], kind) for i, (regime, kind) in enumerate(CLASSES.items())]
    summary = "Points over plain training at (3, 3), for each method, without data and after the free steps"
    return _svg(parts, _LABELS + _PLOT + 24, bottom + 26, summary)


def costs() -> str:
    """Return accuracy at (3, 3) without data over the time of training, a dot per method."""
    kept = accuracy.read(NETWORK)
    found = {m: (_time(kept, m), value(kept, m, WITHOUT_DATA, WIDTH)) for m in names(kept)}
    points = {m: (t, v) for m, (t, v) in found.items() if t is not None and v is not None}
    longest = max(t for t, _ in points.values())

    def x(time: float) -> float:
        return _LEFT + _ACROSS * (time - 1) / max(longest - 1, 1e-9)

    bottom = _TOP + _HIGH
    parts = [_level(at) for at in range(0, 101, 20)]
    parts += [_text(x(at), bottom + 18, f"{at:g}") for at in _ticks(1.0, longest)]
    parts += [
        _point(x(t), _y(v), m, f"{m}: {v:.1f} %, {t:.2f} times the time") for m, (t, v) in points.items()
    ]
    parts += [_key(0, "gradl1", "ours"), _key(1, "other methods", "free"), _key(2, "plain training", "plain")]
    parts.append(_text(_LEFT + _ACROSS / 2, bottom + 38, "training time over plain"))
    summary = "Accuracy in percent at (3, 3) without data over training time, for each method"
    return _svg(parts, _LEFT + _ACROSS + 16, bottom + 46, summary)


def _level(at: int) -> str:
    line = f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _ACROSS}" y1="{_y(at):.1f}" y2="{_y(at):.1f}"/>'
    return line + f'<text x="{_LEFT - 8}" y="{_y(at) + 4:.1f}" text-anchor="end">{at}</text>'


def _y(top1: float) -> float:
    return _TOP + _HIGH * (1 - top1 / 100)


def _point(x: float, y: float, method: str, title: str) -> str:
    kind = "ours" if method.startswith("gradl1") else "plain" if method == PLAIN else "free"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>'


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{words}</text>'


def _gains(kept: Kept, method: str) -> dict[str, float]:
    pairs = {r: (value(kept, method, r, WIDTH), value(kept, PLAIN, r, WIDTH)) for r in CLASSES}
    return {r: own - plain for r, (own, plain) in pairs.items() if own is not None and plain is not None}


def _time(kept: Kept, method: str) -> float | None:
    ratio = accuracy.cost(kept, method)
    return None if ratio == "-" else float(ratio)


def _ticks(low: float, high: float) -> list[float]:
    """Return round values between two ends, about five of them."""
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / s <= 6)
    first = -(-low // step) * step
    return [first + step * i for i in range(int((high - first) / step + 1e-9) + 1)]


def _rule(x: float, bottom: float, at: float) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom:.1f}"/>'
    return line + _text(x, bottom + 18, f"{at:+g}" if at else "0")


def _dot(x: float, y: float, regime: str, title: str) -> str:
    circle = f'<circle class="{CLASSES[regime]}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
    return f"{circle}<title>{title}</title></circle>"


def _key(index: int, words: str, kind: str) -> str:
    x = 20 + 130 * index
    circle = f'<circle class="{kind}" cx="{x}" cy="16" r="4.5"/>'
    return f'{circle}<text x="{x + 12}" y="20">{words}</text>'


def _svg(parts: list[str], width: float, height: float, summary: str) -> str:
    opening = f'<svg class="widths" style="{COLOURS}" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
    return f'{opening} aria-label="{summary}">' + "".join(parts) + "</svg>"
