"""The site's own extensions of MkDocs: links, formulas, figures, docstrings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.pages.blocks import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install '.[docs]'")
pytest.importorskip("ziamath")

import markdown
from mkdocs.config import load_config

from docs_site import figures, formulas, hooks, tables


class Page:
    def __init__(self, place: str) -> None:
        self.file = type("File", (), {"src_uri": place})


@pytest.mark.parametrize(
    ("place", "link", "wanted"),
    [
        ("contributing.md", "docs/benchmarks.md", "benchmarks.md"),
        ("experiments.md", "../CONTRIBUTING.md", "contributing.md"),
        ("how-to/lambda.md", "../training.md#choosing", "../training.md#choosing"),
        ("how-to/lambda.md", "../../CHANGELOG.md", "../changelog.md"),
        ("performance.md", "../bench/results/box/step/chart.svg", "bench/results/box/step/chart.svg"),
        ("index.md", "https://arxiv.org/abs/2002.07520", "https://arxiv.org/abs/2002.07520"),
    ],
)
def test_links_in_the_repository_are_mapped_to_the_site(place: str, link: str, wanted: str) -> None:
    assert hooks.on_page_markdown(f"[here]({link})", Page(place)) == f"[here]({wanted})"


PAGES = [*(ROOT / "docs").rglob("*.md"), *(ROOT / path for path in hooks.OUTSIDE if path.endswith(".md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_items_after_a_block_of_code_stay_in_their_list(page: Path) -> None:
    html = markdown.markdown(page.read_text(), extensions=["tables", "pymdownx.superfences"])
    assert not re.search(r"(?<!<li>)(?<!<li><p>)\b\d\. <strong>", html)


def test_a_deviation_stays_with_its_sign() -> None:
    row = hooks.joined("<td>91.4 ± 0.2</td><td>mean ± deviation</td>")
    assert row == "<td>91.4 ±\N{NO-BREAK SPACE}0.2</td><td>mean ± deviation</td>"


def test_a_number_stays_with_its_unit_outside_code() -> None:
    assert hooks.joined("<p>97.3 % in 4 ms, <code>97.3 %</code></p>") == (
        "<p>97.3\N{NO-BREAK SPACE}% in 4\N{NO-BREAK SPACE}ms, <code>97.3 %</code></p>"
    )


def test_files_outside_docs_that_pages_need_are_there() -> None:
    assert all((ROOT / path).is_file() for path in hooks.OUTSIDE)
    assert list((ROOT / hooks.CHARTS).glob("*/*/*.svg"))


def test_the_search_needs_no_server_and_loads_nothing_from_elsewhere() -> None:
    config = load_config(str(ROOT / "mkdocs.yml"))
    assert "material/offline" in config.plugins
    scripts = config.extra["polyfills"]
    assert len(scripts) == 1
    assert "class" in (ROOT / "docs" / scripts[0]).read_text()


def test_formulas_become_images_that_keep_their_source() -> None:
    page = (
        '<p>so <span class="arithmatex">\\(a &lt; b_1\\)</span>.</p><div class="arithmatex">\\[x^2\\]</div>'
    )
    drawn = formulas.drawn(page)
    assert drawn.count("<path") >= 5
    assert 'aria-label="a &lt; b_1"' in drawn
    assert 'fill="currentColor"' in drawn
    assert "\\(" not in drawn
    assert "\\[" not in drawn


@pytest.mark.parametrize(
    ("formula", "message"), [(r"\frac{a}{", "cannot draw"), (r"\nonsense x", "not known")]
)
def test_a_formula_with_a_mistake_ends_the_build(formula: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formulas.drawn(rf'<span class="arithmatex">\({formula}\)</span>')


def test_the_figure_of_widths_has_the_means_of_the_results() -> None:
    rows = json.loads(figures.RESULTS.read_text())["rows"]
    key = ("gradl1", "per channel", 4, 4)
    four = [row["top1"] for row in rows if (row["method"], row["regime"], row["w"], row["a"]) == key]
    drawn = hooks.on_page_markdown("<!-- figure: widths -->", Page("index.md"))
    assert f"<title>4 bits: {sum(four) / len(four):.1f} %</title>" in drawn
    assert drawn.count("<polyline") == len(figures.LINES) * (1 + len(four))
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert len(heights) == len(figures.LINES) * len(figures.WIDTHS)
    assert heights[0] < heights[5]  # float stands above 2 bits


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("<td>(8, 8) 88.1</td>", "<td>(8,\N{NO-BREAK SPACE}8) 88.1</td>"),
        ("<th>(2, float)</th>", "<th>(2,\N{NO-BREAK SPACE}float)</th>"),
        ("<td><code>f(8, 8)</code></td>", "<td><code>f(8, 8)</code></td>"),
        ("<td><code>a/_b_c.py::d</code></td>", "<td><code>a/<wbr>_b_<wbr>c.py<wbr>::d</code></td>"),
        ("<td><code>BertModel</code></td>", "<td><code>Bert<wbr>Model</code></td>"),
        ("<td><code>Range(a=1)</code></td>", "<td><code>Range(<wbr>a=1)</code></td>"),
        (
            "<td>FullyShardedDataParallel</td>",
            '<td class="long">Fully<wbr>Sharded<wbr>Data<wbr>Parallel</td>',
        ),
        ("<td>on a.0.b, 0.5</td>", "<td>on a<wbr>.0<wbr>.b, 0.5</td>"),
        ("<td>1e-03</td>", '<td class="whole">1e-03</td>'),
        ('<td style="x">' + "a " * 20 + "</td>", '<td class="long" style="x">' + "a " * 20 + "</td>"),
        ("<td>" + "a " * 80 + "</td>", '<td class="long longer">' + "a " * 80 + "</td>"),
        ("<thead><tr></tr></thead>", "<thead><tr></tr></thead>"),
    ],
)
def test_cells_of_tables_are_broken_where_a_reader_would(cell: str, wanted: str) -> None:
    assert tables.readable(cell) == wanted


def test_long_names_in_code_are_broken_between_their_parts() -> None:
    name = "gradl1_fast.training.load"
    page = f"<pre><code>{name}</code></pre><p><code>{name}(path)</code><code>gl.load</code></p>"
    inside = "gradl1_<wbr>fast<wbr>.training<wbr>.load"
    wanted = f"<pre><code>{name}</code></pre><p><code>{inside}(path)</code><code>gl.load</code></p>"
    assert tables.breakable(page) == wanted
    link = f'<code><a href="#{name}">gl</a></code>'
    assert tables.breakable(link) == link


def test_an_option_in_code_stays_whole() -> None:
    page = "<p><code>gradl1 train --penalty-epochs 2</code> -3</p>"
    wanted = '<p><code>gradl1 train <span class="whole">--penalty-epochs</span> 2</code> -3</p>'
    assert tables.breakable(page) == wanted


@pytest.mark.parametrize(
    ("tag", "count"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.example/css">', 1),
        ('<img src="http://example.org/badge.svg">', 1),
        ('<script src="assets/x.js"></script><a href="https://example.org">there</a>', 0),
        ('<link rel="canonical" href="https://example.org/">', 0),
    ],
)
def test_external_resources_are_found(tag: str, count: int) -> None:
    assert len(hooks.from_elsewhere(tag)) == count


def test_roles_in_docstrings_become_links_to_the_reference() -> None:
    griffe = pytest.importorskip("griffe")
    from docs_site.docstrings import Docstrings

    package = griffe.load(
        "gradl1_fast", search_paths=[ROOT], extensions=griffe.load_extensions(Docstrings), submodules=True
    )
    text = package["quantization.bits.set_bits"].docstring.value
    assert "[`calibrate`][gradl1_fast.calibrate] first" in text
    text = package["penalty.GradL1"].docstring.value
    assert "approximation of [`backward`][gradl1_fast.GradL1.backward]" in text
