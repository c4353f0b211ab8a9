from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.full import thinned
from tests.skipped import table

# Tests of minutes, which begin first.
LONG = (
    *("tests/triton/test_interpreted.py", "tests/triton/test_compiled_ahead.py"),
    *("tests/compiled/test_emulated.py", "tests/compiled/test_cuda_sources.py"),
)

try:
    from hypothesis import settings
except ImportError:  # `make gpu` installs nothing, and tests/gpu needs none of it
    pass
else:
    # One and the same examples on every run; `make fuzz` chooses the other profile, and a seed.
    settings.register_profile("ci", derandomize=True, deadline=None)
    settings.register_profile("fuzz", derandomize=False, deadline=None, print_blob=True)
    settings.load_profile("ci")


# Networks of a few channels meet oneDNN issue 6035 on processors without AVX-512, and die of it.
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")


def pytest_configure(config: pytest.Config) -> None:
    # PyTorch says so whenever the two sides of "same" differ, as they do in some cases here.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:], left = thinned(items)
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))  # so that none is left alone at the end
    if left:
        config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := table(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("skipped: how many, where, why")
        terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADL1_BACKEND", raising=False)


@pytest.fixture
def trace_autograd() -> Iterator[None]:
    """torch.compile with autograd.grad inside the compiled region; nothing compiled outlives the test."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Return what puts a terminal in the place of standard error, which pytest sets anew for the test."""

    def put() -> Terminal:
        made = Terminal()
        monkeypatch.setattr(sys, "stderr", made)
        return made

    monkeypatch.setenv("TERM", "xterm")
    return put
