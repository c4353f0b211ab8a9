"""The reference contains every public name."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest

import gradl1_fast as gl
from tests.pages.blocks import ROOT
from tests.vision import make_importable

# Packages that are no interface of the project, and why.
INTERNAL = {
    "gradl1_fast.backends": "who computes; gl.backend is the interface",
    "gradl1_fast.backends.compiled": "the raw sweeps of a backend",
    "gradl1_fast.backends.reference": "likewise",
    "gradl1_fast.backends.triton": "likewise",
    "gradl1_fast.ops": "registered operators; gl.functional is the interface",
    "gradl1_fast.cli": "the command; --help documents it",
}


def documented() -> list[str]:
    pages = (ROOT / "docs" / "reference").glob("*.md")
    lines = [line for page in pages for line in page.read_text().splitlines()]
    return [line.removeprefix("::: ") for line in lines if line.startswith("::: ")]


def resolve(name: str) -> Any:
    """Return an object by its address; a module is preferred to a function of the same name beside it."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], 2):
        try:
            found = importlib.import_module(".".join(parts[:place]))
        except ModuleNotFoundError:
            found = getattr(found, part)
    return found


def test_an_address_refers_to_the_object_not_the_module_of_the_same_name() -> None:
    griffe = pytest.importorskip("griffe", reason="the site is built with it: pip install '.[docs]'")
    package = griffe.load("gradl1_fast", search_paths=[ROOT], submodules=True)
    found = {name: package[name.partition(".")[2]] for name in documented()}
    modules = [name for name, each in found.items() if each.is_module]
    assert not modules, "the site would show the whole module: give the full address"


def public_packages() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(gl.__path__, "gradl1_fast.") if m.ispkg]
    return ["gradl1_fast", "gradl1_fast.functional", *(name for name in found if name not in INTERNAL)]


@pytest.mark.parametrize("package", public_packages())
def test_every_public_name_has_a_place_in_the_reference(package: str) -> None:
    make_importable()
    pytest.importorskip("lightning", reason="the reference has a class for it")
    objects = [resolve(name) for name in documented()]
    module = importlib.import_module(package)
    names = [name for name in getattr(module, "__all__", ()) if not name.startswith("_")]
    public = [name for name in names if not isinstance(getattr(module, name), ModuleType)]
    missing = [name for name in public if not any(getattr(module, name) is each for each in objects)]
    assert not missing, f"put a line `::: {package}.NAME` into docs/reference for each of them"


def test_nothing_is_documented_twice() -> None:
    names = [name.rpartition(".")[2] for name in documented()]
    places = {name for name in names if names.count(name) > 1}
    assert places <= {"NAMES", "load"}, "two names that end alike: links would lead to one of them"
