"""The lazy handle to the compiled module. It is imported at first use; why it failed is kept."""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from gradl1_fast.backends.compiled._sources import fingerprint

_NAME = "gradl1_fast.backends.compiled._gradl1"
_CHECKOUT = Path(__file__).parents[3]


def engine(half: str) -> Any:
    """Return the passes of one half of the extension, ``"host"`` or ``"cuda"``.

    Raises:
        UnavailableError: it is absent; the message says why.
    """
    module, reason = _load()
    found = getattr(module, half, None)
    if found is None:
        from gradl1_fast.backends import UnavailableError

        raise UnavailableError(reason or f"the compiled extension was built without its {half} part")
    return found


def describe() -> dict[str, str]:
    """Return what is built and in use, compilers and instruction sets and so on; or why nothing is."""
    module, reason = _load()
    if module is None:
        return {"built": f"no: {reason}"}
    facts = {"C++ compiler": module.compiler}
    if hasattr(module, "host"):
        sets = ", ".join(module.instruction_sets())
        facts["CPU loops"] = f"{module.instruction_set()}, of {sets} that this processor can run"
        facts["CPU threads"] = "torch's OpenMP" if module.has_team() else "one: no OpenMP runtime found"
    else:
        facts["CPU loops"] = "left out when it was built"
    if hasattr(module, "cuda"):
        facts["CUDA compiler"] = module.cuda_compiler
        facts["CUDA architectures"] = module.cuda_architectures
    else:
        facts["CUDA kernels"] = "left out when it was built: no nvcc, or GRADL1_CUDA=0"
    return facts


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError:
        return None, (
            "the compiled extension is not installed; install gradl1-fast where a C++ compiler is at hand "
            "(pip install --verbose shows what was tried)"
        )
    except ImportError as error:
        return None, f"the compiled extension cannot be loaded: {error}"
    if _is_stale(module):
        reason = (
            f"the compiled extension {module.__file__} was built from other sources than those in "
            f"{_CHECKOUT / 'csrc'}; build it again, in {_CHECKOUT}: pip install --no-deps --editable ."
        )
        warnings.warn(f"gradl1_fast: {reason}; it is not used until then", stacklevel=2)
        return None, reason
    return module, ""


def _is_stale(module: ModuleType) -> bool:
    """Return whether the sources changed after the build; an installed package has none beside it."""
    sources = _CHECKOUT / "csrc"
    if not (_CHECKOUT / "pyproject.toml").is_file() or not sources.is_dir():
        return False
    return getattr(module, "sources", None) != fingerprint(sources)
