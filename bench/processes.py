"""The other end of :mod:`bench.worker`: a process for each provider, and steps taken in turn."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradl1_fast

__all__ = ["HERE", "LostError", "Process", "interleaved"]

HERE = Path(__file__).parent.parent  # the checkout
# The library from one folder, the benchmark from another: how revisions are compared.
_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); import gradl1_fast; sys.path[0] = sys.argv[2]; "
    "from bench.worker import main; main()"
)


class LostError(RuntimeError):
    """A process ended, or gave no answer in time."""


class Process:
    """A provider in a process of its own; to be closed, or used in a ``with`` block.

    Args:
        provider: name of it.
        threads: of its OpenMP; None for the environment's.
        library: folder that holds the ``gradl1_fast`` to be measured; by default the imported one.
    """

    def __init__(self, provider: str, library: Path | None = None, threads: int | None = None) -> None:
        self.provider = provider
        self._environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        self.library = library or Path(gradl1_fast.__file__).parent.parent
        self._start()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(self.library), str(HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=self._environment,
        )
        self._send({"do": "start", "name": self.provider})
        self._has_started = False

    def restart(self) -> None:
        """End the process and start it again."""
        self.close()
        self._start()

    def ask(self, what: str, *, limit: float = 600, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a request; one that cannot be met has ``unavailable`` or ``failed``.

        Args:
            what: a method of the worker.
            limit: seconds to wait.
            arguments: of the method.

        Raises:
            LostError: the process has ended, or did not answer in time and was ended.
        """
        if not self._has_started:
            self._has_started = True
            problem = self._receive(120)
            if problem:
                raise LostError(str(problem))
        self._send({"do": what, **arguments})
        return self._receive(limit)

    def close(self) -> None:
        """End the process."""
        self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout, self._errors):
            if stream:
                stream.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._popen.stdin
        try:
            self._popen.stdin.write(json.dumps(request) + "\n")
            self._popen.stdin.flush()
        except BrokenPipeError as error:
            raise LostError(self._last_words()) from error

    def _receive(self, limit: float) -> dict[str, Any]:
        assert self._popen.stdout
        ready, _, _ = select.select([self._popen.stdout], [], [], limit)
        if not ready:
            self._popen.kill()
            raise LostError(f"gave no answer within {limit:.0f} s")
        line = self._popen.stdout.readline()
        if not line:
            raise LostError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        code = self._popen.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")


def interleaved(processes: Mapping[str, Process], turns: Iterable[int]) -> dict[str, list[float]]:
    """Return the milliseconds of each step; every turn takes each step once, in another order.

    Negative turns warm up and are not kept.
    """
    times: dict[str, list[float]] = {name: [] for name in processes}
    for turn in turns:
        for name in _rotated(list(processes), turn):
            ms = processes[name].ask("time")["ms"]
            if turn >= 0:
                times[name].append(ms)
    return times


def _rotated(names: Sequence[str], turn: int) -> list[str]:
    start = turn % len(names) if names else 0
    return [*names[start:], *names[:start]]
