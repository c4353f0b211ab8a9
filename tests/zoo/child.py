"""The process that checks one model: it sends each result as it comes, and may die at any moment."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.zoo.case import Case
from tests.zoo.checks import CHECKS, OF_RECIPE, Outcome
from tests.zoo.entries import Entry
from tests.zoo.models import MODELS
from tests.zoo.subjects import recipe_of

Record = dict[str, Any]


def work(name: str, results: Connection, memory: int, checks: Sequence[str]) -> None:
    """Check a model; send a record for each of some checks, then None."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    for record in records(MODELS[name], checks):
        results.send(record)
    results.send(None)


def records(entry: Entry, checks: Sequence[str]) -> Iterator[Record]:
    """Check a model as it is, then with dropout and drop path if its factory has them."""
    converted = yield from _records(entry, checks, with_recipe=False)
    if converted and entry.recipe and recipe_of(entry):
        yield from _records(entry, [name for name in OF_RECIPE if name in checks], with_recipe=True)


def _records(entry: Entry, names: Iterable[str], *, with_recipe: bool) -> Generator[Record, None, bool]:
    """Make the checks; return whether there was a converted model to check."""
    suffix = " with recipe" if with_recipe else ""
    begin = time.process_time()
    try:
        case = _quiet(Case, entry, with_recipe=with_recipe)
    except Exception as error:
        yield _record(f"convert{suffix}", Outcome(False, None, _reason(error)), begin)
        return False
    yield _record(f"convert{suffix}", Outcome(True), begin)
    for name in names:
        begin = time.process_time()
        try:
            outcome = _quiet(CHECKS[name], case)
        except Exception as error:
            outcome = Outcome(False, None, _reason(error))
        yield _record(name + suffix, outcome, begin)
    return True


def _quiet(function: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def _record(check: str, outcome: Outcome, begin: float) -> Record:
    return {"check": check, "seconds": round(time.process_time() - begin, 2)} | dataclasses.asdict(outcome)


def _reason(error: Exception) -> str:
    if os.environ.get("ZOO_TRACEBACK"):
        traceback.print_exc()
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
