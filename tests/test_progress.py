"""Progress bars and lines on a terminal, elsewhere, and without rich."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from gradl1_fast import _progress
from gradl1_fast._progress import lines, track
from tests.conftest import Terminal

rich = pytest.importorskip("rich.progress", reason="rich is not installed")


def test_on_a_terminal_there_is_a_bar(terminal: Callable[[], Terminal]) -> None:
    shown = terminal()
    assert list(track(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    assert "letters" in shown.getvalue()
    assert "100%" in shown.getvalue()


@pytest.mark.parametrize("show", [True, False])
def test_there_is_no_bar_elsewhere_or_if_not_requested(show: bool, terminal: Callable[[], Terminal]) -> None:
    shown = terminal()
    shown.isatty = lambda: not show  # type: ignore[method-assign]
    assert list(track("abc", "letters", show=show)) == ["a", "b", "c"]
    assert shown.getvalue() == ""


def test_without_rich_the_work_continues(
    terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terminal()
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert shown.getvalue() == ""


def test_lines_are_printed_on_request_where_there_is_no_terminal(
    terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "_SECONDS", 0)
    with lines():
        for letter in track("ab", "letters"):
            assert list(track(iter(letter), "inner", total=1)) == [letter]
        list(track(iter("c"), "last"))
        list(track("abc", "not shown", show=False))
    list(track("ab", "after"))
    expected = ["letters: 2 to do", "letters: 1 of 2 done in 0 s", "letters: 2 of 2 done in 0 s"]
    expected += ["last: some to do", "last: 1 done in 0 s"]
    assert capsys.readouterr().err.splitlines() == expected
    shown = terminal()
    with lines():
        list(track("abc", "letters"))
    assert "done in" not in shown.getvalue()


def test_few_lines_are_printed_about_short_work(capsys: pytest.CaptureFixture[str]) -> None:
    with lines():
        list(track(range(1000), "numbers"))
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_there_is_no_bar_inside_another_and_errors_propagate(terminal: Callable[[], Terminal]) -> None:
    terminal()
    with rich.Progress():
        assert list(track("abc", "letters")) == ["a", "b", "c"]
    with pytest.raises(ZeroDivisionError):
        list(track((1 // (2 - n) for n in range(3)), "numbers"))


def test_stages_are_bars_on_a_terminal(terminal: Callable[[], Terminal]) -> None:
    shown = terminal()
    from gradl1_fast.cli._stages import stages

    with stages() as stage:
        after_part = stage("training", 2)
        after_part()
        after_part()
    assert "training" in shown.getvalue()
    assert "2/2" in shown.getvalue()
