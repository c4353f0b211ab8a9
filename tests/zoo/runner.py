"""Runs each model in a process of its own, within limits of time and memory, several side by side."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess

from tests.zoo.checks import CHECKS
from tests.zoo.child import Record, work
from tests.zoo.models import is_first_of_family

# Imported once, by the process from which the others are forked.
PRELOAD = [
    *("tests.zoo.child", "timm", "torchvision", "transformers"),
    *("torch._dynamo", "torch.export", "torch.onnx._internal.exporter._core"),
    *("onnxruntime", "onnxscript.function_libs.torch_lib.ops"),
]


@dataclass
class Limits:
    """What may be used, and what is checked.

    Attributes:
        seconds: that a model may take.
        memory: in bytes, likewise.
        jobs: models side by side.
        checks: a pattern in the names of those to make.
        exports: which models are exported: ``"family"``, the first of each, or ``"all"``.
    """

    seconds: float = 150
    memory: int = 8 * 2**30
    jobs: int = 2
    checks: str = ""
    exports: str = "family"


@dataclass
class Task:
    """A model under way.

    Attributes:
        name: of the model.
        process: that checks it.
        results: where its records come from.
        records: those that have come.
        begin: when it was started.
    """

    name: str
    process: ForkServerProcess
    results: Connection
    records: list[Record] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def end(self, reason: str) -> None:
        """Stop the process; write down why, unless it has finished by itself."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.results.close()
        if reason:
            after = self.records[-1]["check"] if self.records else "its start"
            self.records.append({"check": "process", "ok": False, "reason": f"{reason}, after {after}"})


def run_all(names: Sequence[str], limits: Limits) -> Iterator[Task]:
    """Check the models; yield each when it has ended."""
    # Of the processes to come; libraries read them when they are imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting, running = list(reversed(names)), dict[Connection, Task]()
    try:
        while waiting or running:
            while waiting and len(running) < limits.jobs:
                task = _start(context, waiting.pop(), limits)
                running[task.results] = task
            for task in _step(running, limits):
                del running[task.results]
                yield task
    finally:
        for task in running.values():
            task.end("interrupted")


def _start(context: multiprocessing.context.ForkServerContext, name: str, limits: Limits) -> Task:
    results, sender = context.Pipe(duplex=False)
    checks = [check for check in CHECKS if re.search(limits.checks, check)]
    if limits.exports == "family" and not is_first_of_family(name):
        checks = [check for check in checks if check != "export"]
    process = context.Process(target=work, args=(name, sender, limits.memory, checks), daemon=True)
    process.start()
    sender.close()
    return Task(name, process, results)


def _step(running: dict[Connection, Task], limits: Limits) -> Iterator[Task]:
    """Take what has come; yield the tasks that have ended."""
    for results in wait(list(running), timeout=1):
        task = running[results]
        try:
            record = results.recv()
        except EOFError:
            task.process.join()
            task.end(_cause(task.process.exitcode))
            yield task
            continue
        if record is None:
            task.end("")
            yield task
        else:
            task.records.append(record)
    for task in [t for t in running.values() if t.seconds > limits.seconds]:
        task.end(f"took more than {limits.seconds:.0f} s")
        yield task


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with code {code}"
