"""The methods that an experiment compares: the variants that classes declare, and combinations of them."""

from __future__ import annotations

from typing import Any

from gradl1_fast.training import methods
from gradl1_fast.training.methods import Variant
from gradl1_fast.training.methods.composition import SEPARATOR

__all__ = ["VARIANTS", "check_methods", "method_of", "settings_of", "text_of"]

VARIANTS: dict[str, Variant] = {
    variant.name: variant for each in methods.METHODS.values() for variant in each.variants
}
_CLASSES = {variant.name: each.name for each in methods.METHODS.values() for variant in each.variants}


def check_methods(names: list[str]) -> None:
    """Check names of methods, each a key of :data:`VARIANTS` or several with ``+`` between them.

    Raises:
        ValueError: one is unknown, or there is none.
    """
    unknown = [name for name in names if any(part not in VARIANTS for part in name.split(SEPARATOR))]
    if unknown or not names:
        raise ValueError(
            f"methods must be among {', '.join(VARIANTS)}, or several with + between them; "
            f"got {', '.join(unknown) or 'none'}"
        )


def method_of(name: str) -> str:
    """Return what :func:`gradl1_fast.training.methods.make` calls the method of a name."""
    return SEPARATOR.join(_CLASSES[part] for part in name.split(SEPARATOR))


def settings_of(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method.

    Args:
        name: a key of :data:`VARIANTS`, or several with ``+`` between them.
        recipe: settings of the recipe's penalty.
    """
    parts = name.split(SEPARATOR)
    if len(parts) == 1:
        variant = VARIANTS[name]
        return {**recipe, **variant.settings} if variant.keeps_recipe else dict(variant.settings)
    return {
        f"{_CLASSES[part]}.{key}": value for part in parts for key, value in settings_of(part, recipe).items()
    }


def text_of(name: str) -> str:
    """Return what a method does, for a reader; a reconstruction says that it is one."""
    return "; ".join(_text(part) for part in name.split(SEPARATOR))


def _text(name: str) -> str:
    note = " (reconstruction)" if methods.METHODS[_CLASSES[name]].reconstruction else ""
    return VARIANTS[name].text + note
