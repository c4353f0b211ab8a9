"""`make mutate` requires an exit code for each run with the current sources."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:  # a socket takes no long path
        yield Path(name)


RUN = """
import sys
from pathlib import Path

from tests.mutations import forked

folder, sources = Path(sys.argv[1]), sys.argv[2:]
with forked.server(str(folder / "socket")):
    for source in sources:
        (folder / "test_it.py").write_text(source)
        forked.run(str(folder / "socket"), ["-q", "-p", "no:cacheprovider", str(folder / "test_it.py")])
"""
SOURCES = {
    "def test_it():\n    assert True\n": "0",
    "def test_it():\n    assert False\n": "1",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n": "-11",
    "def test_it():\n    pass\n": "0",
}


def test_each_run_sees_the_sources_of_its_time(folder: Path) -> None:
    command = [sys.executable, "-c", RUN, str(folder), *SOURCES]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout
    ended = [line.split()[-1] for line in shown.splitlines() if line.startswith("pytest ended with")]
    assert ended == list(SOURCES.values())


@pytest.mark.parametrize("code", [0, 3])
def test_the_command_runs_beside_a_server_that_ends_with_it(folder: Path, code: int) -> None:
    socket = str(folder / "socket")
    look = f"import os, sys; sys.exit({code} if os.path.exists({socket!r}) else 9)"
    command = [sys.executable, "-m", "tests.mutations.forked", "around", socket, sys.executable, "-c", look]
    assert subprocess.run(command, cwd=ROOT, timeout=300).returncode == code
    assert not Path(socket).exists()
