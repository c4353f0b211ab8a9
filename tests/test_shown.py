"""How results show themselves, as text and in notebooks."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast._shown import Grid, html
from gradl1_fast.penalty import display
from gradl1_fast.quantization.export import Agreement

NAME = "<b>&'"  # of a layer: markup, unless it is escaped


def network() -> nn.Module:
    parts = {
        NAME: nn.Conv2d(1, 3, 3),
        "norm": nn.BatchNorm2d(3),
        "act": nn.ReLU(),
        "conv": nn.Conv2d(3, 4, 3),
    }
    model = gl.convert(
        nn.Sequential(
            OrderedDict(parts),
        )
    ).eval()
    gl.calibrate(model, [images()])
    return model


def images() -> torch.Tensor:
    return torch.randn(8, 1, 8, 8)


@torch.no_grad()
def value(model: nn.Module) -> float:
    return float(model(images()).square().mean())


def penalty() -> gl.GradL1:
    result = gl.GradL1(network(), 0.25, 0.5)
    result(result.model(images()).square().mean())
    return result


RESULTS: dict[str, Callable[[], Any]] = {
    "GradL1": penalty,
    "Report": lambda: gl.report(network()),
    "Table": lambda: gl.sweep(network(), value, [(None, None), (4, 8)]),
    "Preparation": lambda: gl.prepare(network(), [images()], w=3, a=4, criterion=value),
    "Folding": lambda: gl.fold_batch_norm(network(), images()),
    "Plan": lambda: gl.search(network(), value, size=100, choices=(8, 2)),
    "Sensitivity": lambda: gl.sensitivity(network(), value),
    "Costs": lambda: gl.costs(network(), images()),
    "Rounding": lambda: gl.round_weights(network(), [images()], w=3),
    "Reestimation": lambda: gl.reestimate_batch_norm(network(), [images()]),
    "Equalization": lambda: gl.equalize(network()),
    "Agreement": lambda: Agreement(597, 1, NAME, 2e-7, 1.4e-7, 1.0, 1.4e-3, 97.5, 97.8),
}
NAMELESS = {"Table", "Preparation", "Reestimation", "Equalization"}  # these show no layer


class Text(HTMLParser):
    """The cells and paragraphs of a piece of HTML, and the tags and styles in it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.styles: set[str | None] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        self.styles |= {f"{key}={setting}" for key, setting in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("name", RESULTS)
def test_results_show_the_same_in_a_console_and_in_a_notebook(name: str) -> None:
    result = RESULTS[name]()
    assert type(result).__name__ == name
    shown, page = str(result), Text(result._repr_html_())
    assert repr(result) == shown
    assert shown == shown.rstrip()
    assert not page.open
    assert page.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert page.styles <= {"style=text-align: left", "style=text-align: right"}  # no colour of its own
    if name != "GradL1":  # in text, a line of settings
        assert re.sub(r"[\s-]", "", shown) == re.sub(r"[\s-]", "", "".join(page.texts))
    if name not in NAMELESS:
        assert NAME in "".join(page.texts)
        assert NAME not in result._repr_html_()


def test_a_table_pads_its_columns_and_aligns_numbers_right() -> None:
    grid = Grid(("name", "bits"), [("a", "10"), ("longer", "8")], right=(1,))
    assert grid.text() == "name    bits\na         10\nlonger     8"
    assert '<td style="text-align: left">a</td><td style="text-align: right">10</td>' in grid.html()


def test_a_title_stands_above_and_says_that_there_is_nothing() -> None:
    assert Grid(("name",), [("a",)], "Layers").text() == "Layers\nname\n----\na"
    assert "<caption>Layers</caption>" in Grid(("name",), [("a",)], "Layers").html()
    assert Grid(("name",), [], "Layers").text() == "Layers: none"
    assert html([Grid(("name",), [], "Layers"), "a < b"]) == "<p>Layers: none</p><p>a &lt; b</p>"


def test_a_penalty_shows_its_settings_and_last_value() -> None:
    result = gl.GradL1(network(), 0.25, 0.5, every=2)
    settings = "lambda_w=0.25, lambda_a=0.5, scale='step', step_bits=4, every=2"
    assert repr(result) == f"GradL1({settings}): 2 layers and 1 activation of Sequential, not called yet"
    assert "<table>" not in result._repr_html_()
    values = [result(result.model(images()).square().mean()).item() for _ in range(2)]
    assert values[0] == 0
    assert values[1] > 0
    assert repr(result).endswith(f"last value {values[1]:.4g}")
    assert result.value is not None
    assert not result.value.requires_grad


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lambda_w": 0.1, "lambda_a": 0, "scale": "none"}, "lambda_a=0, scale='none'):"),
        ({"share": 0.25}, "(share=0.25, scale='step'"),
        (
            {"lambda_w": 1, "lambda_a": 1, "method": "finite_difference"},
            "'finite_difference', epsilon=0.001)",
        ),
    ],
)
def test_a_penalty_shows_the_settings_that_matter(settings: dict[str, Any], words: str) -> None:
    assert words in repr(gl.GradL1(network(), **settings))


def test_a_share_shows_the_coefficients_once_they_are_found() -> None:
    result = gl.GradL1(network(), share=0.25)
    for _ in range(8):
        assert "lambda" not in repr(result)
        result(result.model(images()).square().mean())
    assert f"share=0.25, lambda_w={result.lambda_w:.4g}" in repr(result)


def test_a_disabled_penalty_says_so() -> None:
    result = penalty()
    result.enabled = False
    assert "enabled=False" in repr(result)


def test_a_notebook_shows_the_largest_terms_first(monkeypatch: pytest.MonkeyPatch) -> None:
    result = penalty()
    (grid,) = display.largest_terms(result)
    assert isinstance(grid, Grid)
    by_size = sorted(result.terms.items(), key=lambda item: -float(item[1]))
    assert [row[:2] for row in grid.rows] == [(name, f"{float(term):.4g}") for name, term in by_size]
    assert sum(float(row[2].removesuffix(" %")) for row in grid.rows) == pytest.approx(100, abs=0.2)
    monkeypatch.setattr(display, "MOST_TERMS", 1)
    assert "<p>and 2 smaller terms</p>" in result._repr_html_()
    assert by_size[1][0] not in result._repr_html_()


def test_the_finite_difference_has_the_value_of_the_exact_penalty() -> None:
    model, x = network().double(), images().double()
    exact = gl.GradL1(model, 0.25, 0.5)
    expected = exact(model(x).square().mean()).detach()
    approximate = gl.GradL1(model, 0.25, 0.5, method="finite_difference")
    approximate.backward(lambda: model(x).square().mean())
    torch.testing.assert_close(approximate.value, expected)
