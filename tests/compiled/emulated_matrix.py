"""The CUDA launchers on the CPU, against the reference: run as a program, with the module's path.

In a process of its own, because it replaces the extension in the package, and because sanitizers have
to be in a process from its start.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

from gradl1_fast.backends import compiled, reference
from gradl1_fast.backends.compiled import _tensors
from tests.compiled.calls import OPERATIONS, batch_norm_act, l1_norm
from tests.compiled.folded import assert_folds
from tests.compiled.prepared import (
    ROUNDING,
    Arguments,
    assert_batch_norm_act,
    assert_ends,
    assert_ends_of_tap,
    assert_sites,
)
from tests.compiled.test_host import TOLERANCES, assert_agree
from tests.ops.layouts import channels_last

# Vector and scalar packs, rows and planes, several chunks, several tiles of channels, a tail.
SHAPES = {
    "planes": [(3, 4, 2, 5), (2, 3, 4, 8), (2, 3, 5, 13), (1, 1, 5, 1031)],
    "rows": [(3, 5, 2, 3), (11, 16, 3, 2), (1, 264, 5, 9)],
}

# The modules of the package that ask which engine computes.
PARTS = [
    f"gradl1_fast.backends.compiled.{name}"
    for name in (
        "_tensors",
        "tap",
        "fake_quantize",
        "l1_norm",
        "batch_norm_act",
        "_prepared",
        "_prepared_batch_norm_act",
    )
]


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_gradl1", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(module: Any, half: str) -> None:
    """Send every sweep of the package on CPU tensors to one half of the module."""
    for part in PARTS:
        vars(sys.modules[part]).update(engine_for=lambda x: getattr(module, half), where=lambda x: (0, 0))
    assert _tensors.engine_for(torch.zeros(())) is getattr(module, half)


def compare(dtypes: list[torch.dtype]) -> int:
    """Compare everything; return the number of calls."""
    calls = 0
    for dtype in dtypes:
        for kind, layout in (("planes", Tensor.contiguous), ("rows", channels_last)):
            for shape in SHAPES[kind]:
                single = shape[0] == 1 and kind == "planes"
                if not single:
                    assert_folds(compiled, shape, dtype, layout)
                arguments = Arguments(shape, dtype, layout)
                assert_ends_of_tap(arguments, compiled, ROUNDING[dtype])
                if shape == SHAPES[kind][0]:
                    assert_prepared(arguments, dtype)
                for operation in OPERATIONS:
                    if operation is batch_norm_act and single:
                        continue
                    for name, given in operation(shape, dtype, layout):
                        actual, expected = (getattr(b, name)(*given) for b in (compiled, reference))
                        tolerance = 0.0 if name == "fake_quantize_forward" else TOLERANCES[dtype]
                        tolerance = max(tolerance, 2e-6) if operation is l1_norm else tolerance
                        assert_agree(actual, expected, tolerance, f"{name} of {shape}, {kind}, {dtype}")
                        calls += 1
    return calls


def assert_prepared(arguments: Arguments, dtype: torch.dtype) -> None:
    """Compare what is prepared with the sweeps of the same half, and its ends with PyTorch's."""
    assert_sites(arguments, compiled)
    for quantized in (False, True):
        assert_batch_norm_act(arguments, compiled, quantized=quantized)
    assert_ends(arguments, compiled, ROUNDING[dtype])


def many_tensors() -> None:
    """More tensors than one launch takes, one of several blocks, odd ones, empty ones."""
    tensors = [torch.randn(n % 7) for n in range(95)] + [torch.randn(70_001), torch.randn(70_001)[1:]]
    paired = [torch.randn_like(t) for t in tensors]
    dy = torch.randn(len(tensors))
    assert_agree(compiled.l1_norm_forward(tensors), reference.l1_norm_forward(tensors), 1e-5, "l1_norm")
    assert_agree(
        compiled.l1_norm_backward(dy, tensors),
        reference.l1_norm_backward(dy, tensors),
        0.0,
        "l1_norm_backward",
    )
    assert_agree(
        compiled.l1_norm_double_backward(paired, tensors),
        reference.l1_norm_double_backward(paired, tensors),
        1e-5,
        "l1_norm_double_backward",
    )


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    module = load(sys.argv[1])
    for half in ("host", "cuda"):
        if hasattr(module, half):
            use(module, half)
            many_tensors()
            print(half, compare([getattr(torch, name) for name in sys.argv[2:]]), "calls agree")


if __name__ == "__main__":
    main()
