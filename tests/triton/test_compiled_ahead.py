"""Compile every kernel for sm_80 and sm_90 as the wrappers launch it, without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from gradl1_fast.backends import contract
from gradl1_fast.backends import triton as kernels
from gradl1_fast.backends.triton import (
    _batch_norm_act_kernels,
    _device,
    _ends,
    fake_quantize,
    l1_norm,
    tap,
)
from tests.full import FULL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
OTHERS = [(90, torch.bfloat16), (90, torch.float16), (90, torch.float64), (80, torch.float32)]
ALL = {
    name
    for module in (_device, _ends, _batch_norm_act_kernels, fake_quantize, l1_norm, tap)
    for name in vars(module)
    if name.endswith("_kernel")
}


class _Driver:
    """Says that there is a GPU; as nothing is launched, nobody finds out."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Collect what is compiled in place of each launch."""
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        found[kernel.hash] = kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return found


def _sweep_all(dtype: torch.dtype) -> None:
    vector = torch.promote_types(dtype, torch.float32)
    one = torch.ones((), dtype=vector)
    line = torch.randn(4099).to(dtype)
    kernels.tap_backward(line)
    kernels.tap_double_backward(line, one, line)
    taps, four = contract.prepare_tap(kernels, line), torch.ones(4, dtype=vector)
    taps.ends(line)
    for dy in (line, None):
        taps.add_ends_gradient(dy, line, four, four)
    x, per_channel = torch.randn(4, 1024).to(dtype), torch.ones(4, dtype=vector)
    for axis, s in ((None, one), (0, per_channel)):
        kernels.fake_quantize_forward(x, s, s, -7, 7, axis)
        kernels.fake_quantize_backward(x, x, s, s, -7, 7, axis, True)
        kernels.fake_quantize_double_backward(x, one, x, x, s, s, -7, 7, axis)
    tensors = [torch.randn(1000).to(dtype) for _ in range(60)]
    norms = kernels.l1_norm_forward(tensors)
    kernels.l1_norm_backward(norms, tensors)
    kernels.l1_norm_double_backward(tensors, tensors)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 32, 8, 8).to(dtype).contiguous(memory_format=layout)
        _batch_norm(x, True, "relu", False)
        _batch_norm(x, True, "relu", True)
        _batch_norm(x, True, "relu", False, quantized=True)
        _batch_norm(x, True, "relu", True, quantized=True)
        _ends_of_batch_norm(x, "relu", False)
        _ends_of_batch_norm(x, "relu", True)
        _batch_norm(x[..., :7].contiguous(memory_format=layout), False, "relu6", True)
    _batch_norm(x, True, "none", False, affine=False)


def _batch_norm(
    x: Any, training: bool, activation: str, residual: bool, affine: bool = True, quantized: bool = False
) -> None:
    c = torch.rand(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    w, r = c if affine else None, x if residual else None
    grid = (c[0], c[1], 0, 7) if quantized else (None, None, 0, 0)
    y, _, mean, rstd = kernels.batch_norm_act_forward(x, w, w, c, c, r, *grid, training, 1e-5, activation)
    saved = (x, x, y, w, w, mean, rstd, *grid, training, activation)
    kernels.batch_norm_act_backward(*saved, residual, True)
    kernels.batch_norm_act_double_backward(x, w, w, r, c[0], *saved, residual)


def _ends_of_batch_norm(x: Any, activation: str, residual: bool) -> None:
    op = contract.prepare_batch_norm_act(
        kernels, x, training=True, eps=1e-5, activation=activation, with_residual=residual, codes=None,
        with_ends=True,
    )  # fmt: skip
    c = torch.rand(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    y, _, mean, rstd, ends = op.forward(x, c, c, None, None, x if residual else None, None, None)
    op.backward(x, x, y, c, c, mean, rstd, None, None, False, ends, c[:2])


@pytest.mark.parametrize(
    ("arch", "dtype"), [(90, torch.float32), (80, torch.bfloat16), *(OTHERS if FULL else [])], ids=str
)
def test_every_kernel_compiles_exactly_and_without_spills(
    arch: int, dtype: torch.dtype, compiled: dict[str, Any], tmp_path: Path
) -> None:
    driver.set_active(_Driver(arch))
    try:
        _sweep_all(dtype)
    finally:
        driver._active = None
    assert {k.metadata.name for k in compiled.values()} == ALL
    registers: dict[str, int] = {}
    for kernel in compiled.values():
        name, ptx = kernel.metadata.name, kernel.asm["ptx"]
        used, spilled = _resources(kernel, tmp_path)
        registers[name] = max(used, registers.get(name, 0))
        # float64 is there for tests; Triton 3.6 stores one register of one kernel in that type
        hot = dtype != torch.float64
        assert not (hot and spilled), (
            f"{name} stores {spilled} registers in local memory, using {used} registers"
        )
        fused = re.search(r"\bfma\.|\.ftz|\bdiv\.(approx|full)|\bsqrt\.approx", _without_products(ptx))
        assert not fused, f"{name}: not IEEE"
        narrow = re.findall(r"tt\.addptr .*: \S+ptr<.*>, (?:tensor<.*x)?i32\b", kernel.asm["ttir"])
        looked_up = 2 if name.startswith("_fake_quantize") else 0  # scale and zero point of a channel
        assert len(narrow) <= looked_up, f"{name}: offsets of 32 bits end at 2^31 elements: {narrow}"
        assert not re.search(r"\batom\.|\bred\.", ptx), f"{name}: atomics"
    print(
        "\n".join(f"sm_{arch} {dtype} {name}: {used} registers" for name, used in sorted(registers.items()))
    )


def _without_products(ptx: str) -> str:
    """Return the code without products of bfloat16 values, which sm_80 computes as ``a * b + -0``."""
    zeros = re.findall(r"mov\.b(?:16|32) \t(%\w+), -(?:32768|2147450880);", ptx)
    for zero in zeros:
        ptx = re.sub(rf"\bfma\.rn\.bf16(x2)? [^;]*, {zero};", "", ptx)
    return ptx


def _resources(kernel: Any, folder: Path) -> tuple[int, int]:
    """Return the registers of a kernel and how often it stores one in local memory, that is, spills."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = _cuobjdump("--dump-resource-usage", cubin)
    used, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    return used, len(re.findall(r"\bSTL\b", _cuobjdump("-sass", cubin))) if stack else 0


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_aligned_memory_is_accessed_in_16_byte_words(compiled: dict[str, Any]) -> None:
    driver.set_active(_Driver(90))
    try:
        line, one = torch.randn(2**16), torch.ones(())
        kernels.tap_double_backward(line, one, line)
        kernels.fake_quantize_backward(line, line, one, one, -7, 7, None, True)
        kernels.l1_norm_forward([line, line])
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 32, 8, 8).contiguous(memory_format=layout)
            _batch_norm(x, True, "relu", False)
    finally:
        driver._active = None
    finishes = {n for n in ALL if n.endswith("finish_kernel")}
    for kernel in compiled.values():
        if kernel.metadata.name not in finishes:
            assert re.search(r"ld\.global(\.\w+)*\.v(4\.b32|2\.b64)", kernel.asm["ptx"]), kernel.metadata.name
