"""Backends: the contract of the raw operations, and the selection of a backend.

A backend is a module or package that provides, for each operation it supports, the passes of that operation
under the names below. It does not use autograd, does not change its arguments, and does not return one of
them. The reference backend defines every pass; other backends have the same signatures and agree with it.

==================  ==========================================================================
operation           passes
==================  ==========================================================================
``tap``             ``tap_backward``, ``tap_double_backward`` (the forward is the identity)
``fake_quantize``   ``fake_quantize_forward``, ``..._backward``, ``..._double_backward``
``l1_norm``         ``l1_norm_forward``, ``..._backward``, ``..._double_backward``
``conv``            ``conv_forward``, ``..._backward``, ``..._double_backward``
``conv_transpose``  ``conv_transpose_forward``, ``..._backward``, ``..._double_backward``
``linear``          ``linear_forward``, ``..._backward``, ``..._double_backward``
``batch_norm_act``  ``batch_norm_act_forward``, ``..._backward``, ``..._double_backward``
==================  ==========================================================================

The backward pass names gradients ``dy`` and ``dx``. The double backward pass adds the prefix ``d_``, which
stands for the derivative of the objective with respect to them. A gradient that was not requested is an empty
tensor of shape ``(0,)``; a missing incoming gradient is ``None``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from gradl1_fast.backends import reference

__all__ = ["OPERATIONS", "PRODUCTS", "UnavailableError", "available", "backend", "chosen_by_name", "resolve"]

OPERATIONS = ("tap", "fake_quantize", "l1_norm", "conv", "conv_transpose", "linear", "batch_norm_act")
# Computed by libraries such as cuDNN and cuBLAS, which only the reference backend calls.
PRODUCTS = ("conv", "conv_transpose", "linear")

_log = logging.getLogger("gradl1_fast")


class UnavailableError(RuntimeError):
    """A backend was requested by name but cannot compute the operation; the message says why."""


def _load_reference(op: str, device: torch.device) -> ModuleType:
    return reference


def _load_triton(op: str, device: torch.device) -> ModuleType:
    """Load the Triton kernels, or the reference for products."""
    if not _is_installed("triton"):
        raise UnavailableError("Triton is not installed; run `pip install triton`")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError(
            "Triton computes on CUDA tensors, and this tensor is on "
            f"{device.type}; to run its interpreter on a CPU, start the program with TRITON_INTERPRET=1"
        )
    if op in PRODUCTS:
        return reference
    from gradl1_fast.backends import triton

    return triton


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _load_cuda(op: str, device: torch.device) -> ModuleType:
    from gradl1_fast.backends import compiled

    return compiled.load("cuda", op, device)


def _load_host(op: str, device: torch.device) -> ModuleType:
    from gradl1_fast.backends import compiled

    return compiled.load("host", op, device)


# Each loader returns the backend of an operation on a device, or raises UnavailableError with the reason.
_LOADERS: dict[str, Callable[[str, torch.device], ModuleType]] = {
    "cuda": _load_cuda,
    "triton": _load_triton,
    "host": _load_host,
    "reference": _load_reference,
}
# The automatic choice is the first available backend for the type of device. `cuda` has not yet been run on a
# GPU and is used only by name, as is Triton's interpreter. On CPUs `host` is the fastest, see bench/results.
_AUTOMATIC = {"cpu": ("host", "reference"), "cuda": ("triton", "reference")}
_OTHER_DEVICES = ("reference",)

# The names of the active `with backend(...)` blocks, global to the process: autograd runs the backward
# pass of CUDA tensors in its own threads, which do not see the caller's context variables.
_forced: list[str] = []


def available() -> tuple[str, ...]:
    """Return the names that :func:`backend` and ``GRADL1_BACKEND`` accept."""
    return tuple(_LOADERS)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager that computes every operation with the named backend, in all threads.

    Args:
        name: one of :func:`available`.

    Raises:
        ValueError: the name is unknown. An operation that the named backend cannot compute raises
            :class:`UnavailableError` when it is called.

    Examples:
        >>> import torch, gradl1_fast as gl
        >>> with gl.backend("reference"):
        ...     y = gl.functional.l1_norm([torch.ones(3)])
        >>> with gl.backend("abacus"):
        ...     pass
        Traceback (most recent call last):
            ...
        ValueError: gradl1_fast.backend(): unknown backend 'abacus'; choose one of ...
    """
    _check_name(name, "gradl1_fast.backend()")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def resolve(op: str, tensor: torch.Tensor) -> ModuleType:
    """Return the backend that computes ``op`` for ``tensor``.

    Precedence: :func:`backend`, then the environment variable ``GRADL1_BACKEND``, then the automatic choice.
    """
    name = chosen_by_name()
    if name:
        _check_name(name, "GRADL1_BACKEND")
        return _LOADERS[name](op, tensor.device)
    return _first_that_can(op, tensor.device.type)


def chosen_by_name() -> str | None:
    """Return the backend requested by :func:`backend` or the environment, or None."""
    return _forced[-1] if _forced else os.environ.get("GRADL1_BACKEND")


@functools.cache
def _first_that_can(op: str, device_type: str) -> ModuleType:
    """Choose once per operation and type of device, and log the choice with every rejection."""
    device, reasons = torch.device(device_type), []
    for name in _AUTOMATIC.get(device_type, _OTHER_DEVICES):
        try:
            chosen = _LOADERS[name](op, device)
        except UnavailableError as reason:
            reasons.append(f"{name}: {reason}")
            continue
        rejected = "".join(f"; not {reason}" for reason in reasons)
        _log.info("%s on %s: %s%s", op, device_type, "reference" if chosen is reference else name, rejected)
        return chosen
    raise UnavailableError(f"no backend can compute {op} on {device_type}: " + "; ".join(reasons))


def _check_name(name: str, source: str) -> None:
    if name not in _LOADERS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(_LOADERS)}")
