"""What a result depends on besides its settings: versions, devices, threads, environment variables."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from gradl1_fast._version import __version__

__all__ = ["describe", "devices", "variables", "versions"]

_PACKAGES = (
    "triton", "numpy", "typer", "rich", "matplotlib", "scikit-learn", "safetensors", "onnx", "onnxruntime",
    "tensorboard", "torchvision", "timm", "lightning", "jax",
)  # fmt: skip
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def describe() -> dict[str, dict[str, str]]:
    """Return versions, devices and environment variables, to be kept beside results."""
    return {"versions": versions(), "devices": devices(), "variables": variables()}


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, torch and the optional packages."""
    found = {"gradl1_fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: _version(name) for name in _PACKAGES}


def devices() -> dict[str, str]:
    """Return the devices that torch can use here, with a description of each."""
    threads = torch.get_num_threads()
    words = "1 thread" if threads == 1 else f"{threads} threads"
    found = {"cpu": f"{_processor()}, {os.cpu_count()} cores, torch uses {words}"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return found


def variables() -> dict[str, str]:
    """Return the environment variables in force that change what this library does, or how fast."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("GRADL1_") or name in _VARIABLES
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    # What decides the speed of convolutions; processors of one name differ.
    capability = torch.backends.cpu.get_cpu_capability()
    return name if capability in ("DEFAULT", "NO AVX") else f"{name} with {capability}"
