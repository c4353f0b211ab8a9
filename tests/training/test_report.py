"""The report: whole, self-contained, and as honest about losses as about gains."""

import base64
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from gradl1_fast.quantization.sweep import Row, Table
from gradl1_fast.training.demo import report
from gradl1_fast.training.demo.demo import PENALISED, PLAIN, Results, Settings
from gradl1_fast.training.demo.speed import EAGER, OURS, OURS_STEP, Speed
from gradl1_fast.training.demo.speed import PLAIN as PLAIN_STEP

BITS = (None, 8, 4, 3)


def results(gain=5.0):
    def table(shift):
        return Table(Row(w, a, 90 + shift) for w in BITS for a in BITS)

    times = {PLAIN_STEP: [1.0], EAGER: [6.0], OURS: [3.0], OURS_STEP: [3.5]}
    return Results(
        Settings(seeds=2, bits=BITS),
        {PLAIN: [table(0), table(1)], PENALISED: [table(gain), table(1)]},
        [Speed("a <small> network", times, 1e-7), Speed("a large network", times, 1e-7)],
        {"all": 60.0},
        {"versions": {"torch": "2"}, "devices": {"cpu": "one"}, "variables": {}},
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.open, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        elif tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.links += [values[name] for name in ("src", "href") if name in values]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_holds_its_charts():
    page = Page(report.html(results()))
    assert page.open == []
    assert len(page.images) == 3
    for image in page.images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        assert image["alt"]
        ElementTree.fromstring(base64.b64decode(data))


def test_the_page_needs_nothing_from_elsewhere():
    assert all(link.startswith("data:") for link in Page(report.html(results())).links)


def test_texts_are_escaped():
    page = report.html(results())
    assert "a <small> network" not in page
    assert "a &lt;small&gt; network" in page


@pytest.mark.parametrize(("gain", "shown", "ahead"), [(5.0, "+2.5", "1 of 2"), (-5.0, "-2.5", "0 of 2")])
def test_losses_are_shown_like_gains(gain, shown, ahead):
    rows = report.accuracy_rows(results(gain))
    assert rows[0][3:] == (shown, ahead)
    assert f"({shown} points; penalised ahead in {ahead} pairs)" in report.verdict(results(gain))[0]


def test_a_spread_names_its_ends():
    assert report.accuracy_rows(results())[0][1] == "90.5 (90.0 to 91.0)"


def test_numbers_are_written_in_full(tmp_path):
    _, numbers = report.write(results(), tmp_path)
    found = json.loads(numbers.read_text())
    assert len(found["accuracy_percent"]) == 2 * 2 * len(BITS) ** 2
    assert found["accuracy_percent"][0] == {"network": PLAIN, "seed": 0, "w": None, "a": None, "value": 90}
    assert found["step_time"][0]["steps"][1] == {
        "kind": EAGER,
        "median_ms": 6.0,
        "ratio": 6.0,
        "times_ms": [6.0],
    }
