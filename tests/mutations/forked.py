"""Runs pytest in a copy of a process that has imported what is slow, as ``make mutate`` does many times.

``python -m tests.mutations.forked around SOCKET COMMAND`` runs a command beside a process that imports and
waits; in it, ``python -m tests.mutations.forked run SOCKET ARGUMENTS`` has pytest run there and ends with its
exit code. What changes between two runs must not have been imported by then: neither the package nor its
tests are.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener

SLOW = ("numpy", "pytest", "torch", "torch._dynamo", "torch.testing._internal.optests")
PROCESSOR = 240  # seconds for one run that takes a little more than one minute; what takes longer hangs
CLOCK = 800  # seconds for one that waits for something


@contextlib.contextmanager
def server(address: str) -> Iterator[None]:
    """Have a process wait at a socket for runs, one after the other; it ends with the block."""
    with Listener(address) as listener:
        child = os.fork()
        if not child:
            _serve(listener)
        try:
            yield
        finally:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)


def _serve(listener: Listener) -> None:
    try:
        for name in SLOW:
            importlib.import_module(name)
        while True:
            with listener.accept() as connection, contextlib.suppress(OSError):  # who asked may be gone
                connection.send(_run(connection))
    finally:  # whatever happens, a child must not go on as its parent
        os._exit(1)


def _run(connection: Connection) -> int:
    """Return the exit code of pytest; less than 0 where a signal ended it, as it does what takes too long."""
    arguments = connection.recv()
    child = os.fork()
    if not child:
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR))
        signal.alarm(CLOCK)
        code = 1
        try:
            code = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(address: str, arguments: list[str]) -> int:
    """Return what the server says of one run."""
    with Client(address) as connection:
        connection.send(arguments)
        code = connection.recv()
    print(f"pytest ended with {code}")
    return code


def main(what: str, address: str, *rest: str) -> int:
    """Do what the arguments say; return an exit code."""
    if what == "run":
        return run(address, list(rest))
    with server(address):
        return subprocess.run(rest).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
