"""The process of one provider: makes its step on request, checks it, takes it, measures it.

Requests and replies are lines of JSON. What the libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

import torch

from bench.counting import Counted
from bench.floors import FLOORS, Floor
from bench.measure import peak_bytes, wait
from bench.oracle import relative_error
from bench.providers import PROVIDERS, CannotRunError
from bench.steps import Step
from bench.workloads import Workload
from gradl1_fast.backends import UnavailableError

__all__ = ["main"]


class Worker:
    """One provider and, after :meth:`prepare`, its step.

    Args:
        name: of the provider, or of a floor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.step: Step | Floor | None = None
        self.workload: Workload | None = None

    def prepare(self, workload: dict[str, Any], truth: str | None, compiler: str) -> dict[str, Any]:
        """Make the step; return the error of its gradient and the seconds that this took.

        Args:
            workload: fields of a workload.
            truth: file of the oracle's gradient; None to compare with nothing.
            compiler: backend of torch.compile.
        """
        self.step = None
        if "torch._dynamo" in sys.modules:  # importing it takes longer than a step
            torch._dynamo.reset()
        self.workload = Workload(**workload)
        tf32 = self.workload.tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = self.workload.device == "cuda"
        if self.name in FLOORS:
            self.step = FLOORS[self.name](self.workload.task())
            return {}
        start = time.perf_counter()
        step = PROVIDERS[self.name].step(self.workload, compiler)
        gradients = step.gradients()
        seconds = time.perf_counter() - start
        error = relative_error(gradients, torch.load(truth, weights_only=True)) if truth else None
        step()  # whatever a first step sets up
        self.step = step
        return {"gradient_error": error, "prepare_s": round(seconds, 2)}

    def time(self) -> dict[str, float]:
        """Take the step once; return its milliseconds, of one optimisation step."""
        assert self.step is not None
        wait()
        start = time.perf_counter()
        self.step()
        wait()
        return {"ms": 1e3 * (time.perf_counter() - start) / self.step.steps}

    def measure(self) -> dict[str, Any]:
        """Return the peak of live bytes, and operators and bytes moved where they can be seen."""
        assert self.workload is not None
        step: Any = self.step
        if self.name in FLOORS:
            return step.counts()
        own = getattr(step, "peak_bytes", None)
        peak = own() if own else peak_bytes(step, torch.device(self.workload.device))
        return {"peak_bytes": peak, **_count(step)}


def _count(step: Step) -> dict[str, int | None]:
    """Count operators; those inside a compiled region or another library are not seen."""
    if not step.shows_operators:
        return {"operator_calls": None, "bytes_moved": None}
    with Counted() as counted:
        step()
    return {
        "operator_calls": round(counted.calls / step.steps),
        "bytes_moved": round(counted.bytes / step.steps),
    }


def main() -> None:
    """Serve requests until the pipe is closed."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        what = request.pop("do")
        try:
            if what == "start":
                worker = Worker(**request)
                answer: dict[str, Any] = {}
            else:
                answer = getattr(worker, what)(**request)
        except (CannotRunError, ImportError, UnavailableError) as reason:
            answer = {"unavailable": str(reason)}
        except Exception as error:  # one provider's failure is a row of the result
            answer = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        _send(replies, answer)


def _send(replies: TextIO, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
