"""The lazy handle to the compiled module. It is imported at first use; why it failed is kept."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

_NAME = "gradl1_fast.backends.compiled._gradl1"


def engine(half: str) -> Any:
    """Return the sweeps of one half of the extension, ``"host"`` or ``"cuda"``.

    Raises:
        UnavailableError: it is absent; the message says why.
    """
    module, reason = _load()
    found = getattr(module, half, None)
    if found is None:
        from gradl1_fast.backends import UnavailableError

        raise UnavailableError(reason or f"the compiled extension was built without its {half} part")
    return found


def describe() -> dict[str, Any]:
    """Return what is built: compiler, CUDA compiler and architectures, instruction sets, or the failure."""
    module, reason = _load()
    if module is None:
        return {"built": False, "reason": reason}
    facts: dict[str, Any] = {"built": True, "compiler": module.compiler, "cuda": module.cuda_compiler}
    facts["cuda_architectures"] = module.cuda_architectures
    if hasattr(module, "host"):
        facts["instruction_sets"] = list(module.instruction_sets())
        facts["instruction_set"] = module.instruction_set()
        facts["threads"] = "torch's OpenMP" if module.has_team() else "one: no OpenMP runtime found"
    return facts


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(_NAME), ""
    except ModuleNotFoundError:
        return None, (
            "the compiled extension is not installed; install gradl1-fast where a C++ compiler is at hand "
            "(pip install --verbose shows what was tried)"
        )
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded: {error}"
