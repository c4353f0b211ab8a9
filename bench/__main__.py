"""``python -m bench``, or ``gradl1 bench``: time and memory of operations and training steps."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from gradl1_fast.cli._console import fail, table

__all__ = ["app"]

Rows = list[dict[str, Any]]

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Measure operations, training steps and how they grow, by this library and its peers.\n\n"
        "Without a subcommand: all three, which takes about half an hour on two CPU cores, most of it "
        "compiling. Each gradient is compared with float64 double backprop before its time is taken.\n\n"
        "Runs in a checkout of the project: pip install --editable '.[cli,bench]'"
    ),
    epilog="Example: gradl1 bench step --smoke",
)

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Rounds = Annotated[int, typer.Option(min=2, help="Timed repetitions per provider; providers take turns.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny sizes, to check that everything runs.")]
Networks = Annotated[list[str] | None, typer.Option(help="Measure only this network; may be repeated.")]
Deep = Annotated[
    bool,
    typer.Option("--deep", help="Measure compiled providers on every network, not only on the first."),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the list of rows to this file.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; by default bench/results/DEVICE, and none with --smoke."),
]


@app.callback()
def _all(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        step()
        ops()
        scale()


@app.command(epilog="Example: gradl1 bench step --smoke --json rows.json")
def step(
    smoke: Smoke = False,
    json: Json = None,
    out: Out = None,
    device: Device = "cpu",
    rounds: Rounds = 7,
    network: Networks = None,
    deep: Deep = False,
) -> None:
    """Measure a whole training step by every provider, on four networks at two image sizes.

    Takes a few minutes with --smoke, otherwise about a quarter of an hour on
    two CPU cores. Results are written after each network and size.
    """  # fmt: skip
    steps, tables = _module("step"), _module("tables")
    _check_device(device)
    todo = _chosen(steps.SMOKE if smoke else steps.workloads(device), network)
    quick = {"rounds": 3, "warm_up": 1, "compiler": "aot_eager", "threads": 1} if smoke else {}
    settings = steps.Settings(**{"rounds": rounds, "deep": deep, **quick})
    folder, rows = None if smoke else _folder(out, device), []

    def done(workload: Any, found: Rows) -> None:
        rows.extend(found)
        _print(workload.title(), tables.steps(found, wide=Console().width >= 140), found)
        _write("step", rows, device, folder, json, rounds=settings.rounds)

    steps.measure(todo, settings, done)
    _say_where(folder, "step")


@app.command(epilog="Example: gradl1 bench ops --device cuda")
def ops(
    smoke: Smoke = False, json: Json = None, out: Out = None, device: Device = "cpu", rounds: Rounds = 15
) -> None:
    """Measure every operation and sweep by every backend, by plain PyTorch and compiled, against a copy.

    Convolution's double backward for the layer shapes of ResNet-18, ResNet-50
    and MobileNetV2 is compared with PyTorch's own.
    """  # fmt: skip
    family, tables = _module("ops"), _module("tables")
    _check_device(device)
    quick = {"rounds": 3, "compiler": "aot_eager"} if smoke else {"rounds": rounds}
    rows = family.measure(device, smoke=smoke, **quick)
    for dtype, layout in dict.fromkeys((row["dtype"], row["layout"]) for row in rows):
        some = [row for row in rows if (row["dtype"], row["layout"]) == (dtype, layout)]
        _print(f"Operations, {dtype}, {layout}", tables.ops(some), some)
    folder = None if smoke else _folder(out, device)
    _write("ops", rows, device, folder, json, **quick)
    _say_where(folder, "ops")


@app.command(epilog="Example: gradl1 bench scale --rounds 5")
def scale(
    smoke: Smoke = False, json: Json = None, out: Out = None, device: Device = "cpu", rounds: Rounds = 7
) -> None:
    """Measure how time and memory of a step grow with batch, width, depth, and ranks under DDP."""
    family, tables = _module("scale"), _module("tables")
    _check_device(device)
    rows = family.measure(device, smoke=smoke, rounds=3 if smoke else rounds)
    for factor in dict.fromkeys(row["sweep"] for row in rows):
        some = [row for row in rows if row["sweep"] == factor]
        _print(f"Growth with {factor}", tables.scale(some), some)
    folder = None if smoke else _folder(out, device)
    _write("scale", rows, device, folder, json, rounds=rounds)
    _say_where(folder, "scale")


@app.command(epilog="Example: gradl1 bench compare HEAD~1")
def compare(
    base: Annotated[str, typer.Argument(help="A git revision.")],
    smoke: Smoke = False,
    device: Device = "cpu",
    rounds: Rounds = 15,
) -> None:
    """Measure the working tree's training step against that of another revision, in turns."""
    comparison, steps, tables = _module("compare"), _module("step"), _module("tables")
    _check_device(device)
    todo = steps.SMOKE[:1] if smoke else steps.workloads(device)[: len(steps.SMOKE)]
    settings = steps.Settings(rounds=3 if smoke else rounds)
    try:
        rows = comparison.compare(base, todo, settings)
    except comparison.NoRevisionError as error:
        fail(str(error))
    _print(f"Working tree against {base}", tables.compared(rows), rows)


def _module(name: str) -> ModuleType:
    """Import a module of the benchmarks when it is needed: ``--help`` needs none."""
    try:
        return importlib.import_module(f"bench.{name}")
    except ImportError as error:
        fail(str(error))


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        fail(f"--device: cpu or cuda, not {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no CUDA device here")


def _print(title: str, content: tuple[tuple[str, ...], Iterable[tuple[str, ...]]], rows: Rows) -> None:
    console = Console()
    console.print("", table(title, *content))
    for line in _module("tables").reasons(rows):
        console.print(f"  not {line}", highlight=False, markup=False, soft_wrap=True)


def _folder(out: Path | None, device: str) -> Path:
    results, processes = _module("results"), _module("processes")
    return out or processes.HERE / "bench" / "results" / results.device_name(device)


def _chosen(workloads: Iterable[Any], networks: list[str] | None) -> list[Any]:
    """Return the workloads of some networks, or all."""
    every = list(workloads)
    known = list(dict.fromkeys(w.network for w in every))
    for name in networks or ():
        if name not in known:
            fail(f"--network: one of {', '.join(known)}, not {name!r}")
    return [w for w in every if not networks or w.network in networks]


def _say_where(folder: Path | None, family: str) -> None:
    if folder:
        Console().print(f"\nResults and plot: {folder / family}", soft_wrap=True)


def _write(family: str, rows: Rows, device: str, folder: Path | None, json: Path | None, **how: Any) -> None:
    results = _module("results")
    try:
        if json:
            results.write_json(json, rows)
        if folder:
            results.write(folder / family, rows, **how)
            plots: Callable[..., Any] = getattr(_module("plots"), family)
            _module("plots").save(plots(rows), folder / family)
    except (OSError, ImportError) as error:
        fail(f"cannot write the results: {error}")


if __name__ == "__main__":
    app(prog_name="gradl1 bench")
