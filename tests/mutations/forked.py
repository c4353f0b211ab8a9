"""Runs pytest in a copy of a process that has imported what is slow, as ``make mutate`` does many times.

``python -m tests.mutations.forked serve SOCKET`` imports and waits; with ``SOCKET ARGUMENTS`` instead it has
pytest run there and ends with its exit code. What changes between two runs must not have been imported by
then: neither the package nor its tests are.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
from multiprocessing.connection import Client, Connection, Listener

SLOW = ("numpy", "pytest", "torch", "torch._dynamo", "torch.testing._internal.optests")
SECONDS = 240  # of a processor, for one run that takes a little more than a minute; what takes longer hangs


def serve(address: str) -> None:
    """Wait for runs, one after the other."""
    for name in SLOW:
        importlib.import_module(name)
    with Listener(address) as listener:
        while True:
            with listener.accept() as connection:
                connection.send(run(connection))


def run(connection: Connection) -> int:
    """Return the exit code of pytest; less than 0 where a signal ended it, as it does what takes too long."""
    arguments = connection.recv()
    child = os.fork()
    if not child:
        import pytest

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        code = 1
        try:
            code = int(pytest.main(arguments))
        finally:  # whatever happens, a child must not go on as the server
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ask(address: str, arguments: list[str]) -> int:
    """Return what the server says of one run."""
    with Client(address) as connection:
        connection.send(arguments)
        code = connection.recv()
    print(f"pytest ended with {code}")
    return code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
