"""The methods that an experiment compares: the variants that classes declare, and combinations of them."""

from __future__ import annotations

from typing import Any

from gradl1_fast.training import methods
from gradl1_fast.training.methods import Variant
from gradl1_fast.training.methods.composition import SEPARATOR
from gradl1_fast.training.models import INITIALISERS

__all__ = ["VARIANTS", "at", "check_methods", "initialiser_of", "method_of", "settings_of", "text_of"]

AT = "@"  # before the name of an initialiser

VARIANTS: dict[str, Variant] = {
    variant.name: variant for each in methods.METHODS.values() for variant in each.variants
}
_CLASSES = {variant.name: each.name for each in methods.METHODS.values() for variant in each.variants}


def at(name: str, initialiser: str | None) -> str:
    """Return the name of a method with an initialiser, ``method@initialiser``."""
    return name if initialiser is None else f"{name}{AT}{initialiser}"


def initialiser_of(name: str) -> str | None:
    """Return the initialiser in the name of a method, or None."""
    return name.partition(AT)[2] or None


def _parts(name: str) -> list[str]:
    return name.partition(AT)[0].split(SEPARATOR)


def check_methods(names: list[str]) -> None:
    """Check names of methods: keys of :data:`VARIANTS`, several with ``+``, an initialiser behind ``@``.

    Raises:
        ValueError: one is unknown, or there is none.
    """
    unknown = [name for name in names if not _is_known(name)]
    if unknown or not names:
        raise ValueError(
            f"methods must be among {', '.join(VARIANTS)}, or several with + between them; "
            f"got {', '.join(unknown) or 'none'}"
        )


def _is_known(name: str) -> bool:
    initialiser = initialiser_of(name)
    return all(part in VARIANTS for part in _parts(name)) and initialiser in (None, *INITIALISERS)


def method_of(name: str) -> str:
    """Return what :func:`gradl1_fast.training.methods.make` calls the method of a name."""
    return SEPARATOR.join(_CLASSES[part] for part in _parts(name))


def settings_of(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method.

    Args:
        name: a key of :data:`VARIANTS`, or several with ``+`` between them.
        recipe: settings of the recipe's penalty.
    """
    parts = _parts(name)
    if len(parts) == 1:
        variant = VARIANTS[parts[0]]
        return {**recipe, **variant.settings} if variant.keeps_recipe else dict(variant.settings)
    return {
        f"{_CLASSES[part]}.{key}": value for part in parts for key, value in settings_of(part, recipe).items()
    }


def text_of(name: str) -> str:
    """Return what a method does, for a reader; a reconstruction says that it is one."""
    start = initialiser_of(name)
    note = [] if start is None else [f"initial weights {start}"]
    return "; ".join([*(_text(part) for part in _parts(name)), *note])


def _text(name: str) -> str:
    note = " (reconstruction)" if methods.METHODS[_CLASSES[name]].reconstruction else ""
    return VARIANTS[name].text + note
