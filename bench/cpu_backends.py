"""Which backend is faster on this CPU: the penalised step of a ResNet-18 by each, beside the plain step.

Run it on an otherwise idle machine::

    python -m bench.cpu_backends --out bench/results/<device>

All steps are timed in turn, round after round, and medians are compared within the run. Such a result
decides the automatic choice on CPU tensors in ``gradl1_fast/backends/__init__.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.backends import backend
from gradl1_fast.backends.compiled._extension import describe

Step = Callable[[], None]

# On a machine that others use, the processor's time on one thread says more than the time that passed.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation behind the sum."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int) -> nn.Module:
    """Return a ResNet-18 for images of 32 x 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        for index in range(2):
            outputs = width * 2**stage
            layers.append(Block(inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def step_of(
    batch: tuple[Tensor, Tensor], lambdas: tuple[float, float] | None, name: str, size: argparse.Namespace
) -> Step:
    """Return one training step: plain torch, or penalised with the named backend."""
    torch.manual_seed(0)
    model = resnet18(size.width).to(memory_format=torch.channels_last)
    penalty: Any = None
    if lambdas is not None:
        model = gl.convert(model)
        penalty = gl.GradL1(model, lambda_w=lambdas[0], lambda_a=lambdas[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with nullcontext() if penalty is None else backend(name):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            (loss if penalty is None else loss + penalty(loss)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return milliseconds of each step, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 3):
        for name, step in steps.items():
            start = clock()
            step()
            if round_ >= 3:
                times[name].append(1e3 * (clock() - start))
    return times


def convolution_share(step: Step) -> dict[str, float]:
    """Return milliseconds spent in convolutions and in everything, of one profiled step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(5):
            step()
    events = profile.key_averages()
    convolution = sum(e.self_cpu_time_total for e in events if "conv" in e.key.lower())
    return {
        "convolutions": convolution / 5e3,
        "all operators": sum(e.self_cpu_time_total for e in events) / 5e3,
    }


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge the numbers."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "extension": describe(),
    }


def processor() -> str:
    """Return the name of the processor."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(
            (line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("width", 32), ("batch", 32), ("image", 32), ("rounds", 21), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path)
    size = parser.parse_args()
    torch.set_num_threads(size.threads)
    torch.manual_seed(1)
    images = torch.randn(size.batch, 3, size.image, size.image).contiguous(memory_format=torch.channels_last)
    batch = (images, torch.randint(10, (size.batch,)))
    steps = {"plain torch": step_of(batch, None, "", size)}
    for terms, lambdas in (("weights", (0.01, 0.0)), ("weights and activations", (0.01, 0.01))):
        for name in ("reference", "host"):
            steps[f"penalty on {terms}, {name}"] = step_of(batch, lambdas, name, size)
    report(steps, measure(steps, size.rounds, CLOCKS[size.clock]), size)


def report(steps: dict[str, Step], times: dict[str, list[float]], size: argparse.Namespace) -> None:
    """Print the table; write it with the environment if a folder was given."""
    plain = statistics.median(times["plain torch"])
    rows = {}
    for name, step in steps.items():
        median = statistics.median(times[name])
        share = convolution_share(step)
        rows[name] = {
            "median_ms": median,
            "times_plain": median / plain,
            "profile_ms": share,
            "ms": times[name],
        }
        print(
            f"{name:45} {median:8.1f} ms  {median / plain:5.2f} x plain;"
            f" convolutions {share['convolutions']:.1f} ms of {share['all operators']:.1f} ms profiled"
        )
    if size.out:
        options = {k: v for k, v in vars(size).items() if k != "out"}
        size.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment(), "options": options, "steps": rows}, indent=1)
        (size.out / "cpu_backends.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
