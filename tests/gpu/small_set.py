"""Every sweep of the named backends once on small tensors: a program for compute-sanitizer.

``compute-sanitizer --tool racecheck python -m tests.gpu.small_set cuda triton``

Inputs are made on the CPU and copied, so that the tool sees hardly any kernel but ours; with
``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` every tensor has memory of its own, with a real end. Results are compared
too: a sweep that wrote nothing would be clean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.backends import available, backend, reference, resolve
from tests.compiled.calls import OPERATIONS, l1_norm
from tests.compiled.folded import assert_folds
from tests.compiled.test_host import TOLERANCES, assert_agree
from tests.ops.layouts import channels_last

# Packs and single elements, several chunks of one channel, more channels than one tile.
SHAPES = [
    ((2, 3, 4, 8), Tensor.contiguous),
    ((1, 2, 5, 1031), Tensor.contiguous),
    ((11, 264, 3, 2), channels_last),
]
DTYPES = (torch.float32, torch.bfloat16)


def moved(value: Any, device: torch.device) -> Any:
    """Return tensors, and lists of them, on the device, each laid out as it was."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device=device).copy_(value)
    return [moved(v, device) for v in value] if isinstance(value, list) else value


def back(value: Any) -> Any:
    """Return results on the CPU."""
    return value.cpu() if isinstance(value, Tensor) else [v.cpu() for v in value]


def sweep_all(name: str, device: torch.device, report: Callable[[str], None] = print) -> int:
    """Call and compare every sweep; return how many calls there were."""
    calls = 0
    with backend(name):
        sweeps = resolve("tap", torch.empty(0, device=device))
    for dtype in DTYPES:
        for shape, layout in SHAPES:
            assert_folds(sweeps, shape, dtype, layout, device)
            for operation in OPERATIONS:
                tolerance = max(TOLERANCES[dtype], 2e-6 if operation is l1_norm else 0.0)
                for sweep, arguments in operation(shape, dtype, layout):
                    expected = getattr(reference, sweep)(*arguments)
                    actual = back(getattr(sweeps, sweep)(*(moved(a, device) for a in arguments)))
                    assert_agree(actual, expected, tolerance, f"{sweep} of {shape}, {dtype}")
                    calls += 1
    report(f"{name}: {calls} calls agree with the reference")
    return calls


def main() -> None:
    """Sweep with the backends named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backends", nargs="+", choices=available())
    for name in parser.parse_args().backends:
        torch.manual_seed(0)
        sweep_all(name, torch.device("cpu" if name == "host" else "cuda"))


if __name__ == "__main__":
    main()
