"""The module refuses what would make it leave its memory, and depends on nothing it should not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiled.linkage import assert_runs_anywhere

HERE = (1, 0)
FLAT = {"dtype": 0, "layout": (1, 1, 8)}
NORM = {
    "dtype": 0, "layout": (4, 2, 1), "training": True, "eps": 1e-5, "activation": 1, "with_residual": False,
    "quantized": False, "code_min": 0, "code_max": 0, "with_ends": False,
}  # fmt: skip


def spans(*sizes: int) -> list[Any]:
    tensors = [torch.zeros(n) for n in sizes]
    return [tensors, *((t.data_ptr(), 4 * n) for t, n in zip(tensors, sizes, strict=True))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": None}, "dy is missing"),
        ({"dy": (0, 32)}, "dy has no memory"),
        ({"dy": (4098, 32)}, "dy is not aligned"),
        ({"dy": (4096, 31)}, "dy has 31 bytes, needs 32"),
        ({"dy": (4096,)}, "must be \\(address, bytes\\)"),
        ({"scratch": (4096, 8)}, "scratch has 8 bytes"),
    ],
)
def test_bad_memory_is_refused(change: dict[str, Any], message: str, loops: Any) -> None:
    keep, dy, l1, scratch = spans(8, 1, 1000)
    good = {"dy": dy, "l1": l1, "scratch": scratch}
    loops.tap_backward(HERE, FLAT, **good)
    with pytest.raises(ValueError, match=message):
        loops.tap_backward(HERE, FLAT, **(good | change))
    assert keep


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 7}, "dtype tag 7"),
        ({"dtype": 1}, "dy has 32 bytes, needs 64"),
        ({"layout": (1, 1, -1)}, "negative"),
        ({"layout": (1, 1, 2**62)}, "too large"),
        ({"layout": (1, 1, 0)}, "no elements"),
        ({"layout": (1, 1, 9)}, "dy has 32 bytes, needs 36"),
        ({"numel": 8}, "the settings are dtype layout, and no others"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str, loops: Any) -> None:
    keep, dy, l1 = spans(8, 1)
    with pytest.raises(ValueError, match=message):
        loops.tap_backward(HERE, FLAT | change, dy=dy, l1=l1)
    assert keep


def test_bad_options_are_refused(loops: Any) -> None:
    keep, x, y, vector = spans(8, 8, 2)

    def call(change: dict[str, Any], **memory: Any) -> None:
        given = {"x": x, "y": y, "mean": vector, "rstd": vector} | memory
        loops.batch_norm_act_forward(HERE, NORM | change, **given)

    call({})
    for change, message in (
        ({"activation": 3}, "activation tag 3"),
        ({"layout": (4, 2)}, "layout must be"),
        ({"layout": (2, 4, 1)}, "mean has 8 bytes, needs 16"),
        ({"layout": (2**40, 2**40, 1)}, "too large"),
        ({"training": False}, "running_mean is missing"),
        ({"quantized": True, "with_ends": True}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            call(change)
    with pytest.raises(ValueError, match="the setting eps is missing"):
        loops.batch_norm_act_forward(HERE, {n: v for n, v in NORM.items() if n != "eps"}, x=x, y=y)
    for error, change, memory, message in (
        (TypeError, {"eps": "small"}, {}, "the setting eps cannot be 'small'"),
        (TypeError, {}, {"dx": x}, "batch_norm_act_forward has no field dx"),
    ):
        with pytest.raises(error, match=message):
            call(change, **memory)
    assert keep


def test_unknown_instruction_set_is_refused(module: Any) -> None:
    with pytest.raises(ValueError, match="instruction set mmx"):
        module.use_instruction_set("mmx")


def test_module_names_no_torch_no_driver_and_no_thread_pool(module: Any) -> None:
    """So one built wheel works under every torch, and on a machine without GPU or driver."""
    assert_runs_anywhere(Path(module.__file__))


def test_module_runs_without_torch(module: Any) -> None:
    """Loaded by itself: no OpenMP runtime is in the process, and everything runs on one thread."""
    code = (
        "import importlib.util as u, array, sys\n"
        f"s = u.spec_from_file_location('_gradl1', {module.__file__!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "x = array.array('f', [-2.0] * 100_000); out = array.array('f', [0.0])\n"
        "span = lambda a: (a.buffer_info()[0], len(a) * a.itemsize)\n"
        "settings = {'dtype': 0, 'layout': (1, 1, len(x))}\n"
        "m.host.tap_backward((8, 0), settings, dy=span(x), l1=span(out))\n"
        "assert out[0] == 200_000 and not m.has_team() and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


@pytest.mark.usefixtures("module")
def test_threads_are_torchs_own() -> None:
    """In a process of its own: other packages may have brought runtimes of theirs into this one."""
    code = (
        "import torch\n"
        "from gradl1_fast.backends.compiled import _gradl1\n"
        "assert _gradl1.has_team()\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "runtimes = [name for name in names if 'libgomp' in name or 'libomp' in name]\n"
        "assert len(runtimes) == 1, runtimes\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_forked_worker_computes_too(module: Any) -> None:
    """As a data loader forks after torch used its threads; the worker has one, as torch gives it."""
    code = (
        "import os, torch\n"
        "from gradl1_fast.backends import backend, resolve\n"
        "with backend('host'): host = resolve('tap', torch.zeros(()))\n"
        "x = torch.ones(1 << 20); torch.set_num_threads(2); assert host.tap_backward(x) == 1 << 20\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return host.tap_backward(x)\n"
        "loader = torch.utils.data.DataLoader(Data(), num_workers=2, timeout=60)\n"
        "assert torch.cat(list(loader)).tolist() == [1 << 20] * 4\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
