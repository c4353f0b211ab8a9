"""What `make mutate` relies on: an exit code for each run, of the sources as they are then."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutations import forked

ARGUMENTS = ["-q", "-p", "no:cacheprovider"]


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[str]:
    address = str(tmp_path / "socket")
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.mutations.forked", "serve", address], cwd=root
    ) as server:
        deadline = time.monotonic() + 120
        while not Path(address).exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield address
        server.terminate()


def test_each_run_sees_the_sources_of_its_time(tmp_path: Path, socket: str) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("def test_it():\n    assert True\n")
    assert forked.ask(socket, [*ARGUMENTS, str(file)]) == pytest.ExitCode.OK
    file.write_text("def test_it():\n    assert False\n")
    assert forked.ask(socket, [*ARGUMENTS, str(file)]) == pytest.ExitCode.TESTS_FAILED
    file.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert forked.ask(socket, [*ARGUMENTS, str(file)]) < 0
    file.write_text("def test_it():\n    pass\n")
    assert forked.ask(socket, [*ARGUMENTS, str(file)]) == pytest.ExitCode.OK
