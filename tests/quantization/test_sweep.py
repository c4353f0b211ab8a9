"""A model at many widths, and the resulting table."""

from __future__ import annotations

import csv
import json
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.quantization.sweep import Row
from tests.networks import VGG

WIDTHS = [(8, 8), (None, 4), (2, None), (None, None)]


@pytest.fixture
def model() -> nn.Module:
    model = gl.convert(VGG.make().eval())
    gl.calibrate(model, [VGG.batch()])
    return model


def of_widths(model: nn.Module) -> float:
    layer, quantizer = model.get_submodule("0"), model.get_submodule("3.input_quantizer") or None
    return 10 * (layer.weight_quantizer.bits or 0) + (quantizer.bits or 0)


@pytest.fixture
def table(model: nn.Module) -> gl.Table:
    return gl.sweep(model, of_widths, WIDTHS)


def test_one_row_for_each_width_in_order(table: gl.Table, model: nn.Module) -> None:
    assert table.rows == [Row(8, 8, 88.0), Row(None, 4, 4.0), Row(2, None, 20.0), Row(None, None, 0.0)]
    assert table[8, 8] == 88.0
    assert table[None, 4] == 4.0
    assert of_widths(model) == 0


def test_a_table_is_printed_and_iterated_by_row(table: gl.Table) -> None:
    assert list(table) == table.rows
    assert repr(table) == str(table)


def test_an_evaluation_in_training_mode_is_named(model: nn.Module) -> None:
    def evaluate(model: nn.Module) -> float:
        return float(model(VGG.batch()[0]).detach().sum())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.sweep(model, evaluate, WIDTHS)
    with pytest.warns(UserWarning, match=r"changed 1\.num_batches_tracked.*model\.eval\(\)") as caught:
        gl.sweep(model.train(), evaluate, WIDTHS)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_unchanged_buffers_give_no_warning(model: nn.Module) -> None:
    def evaluate(model: nn.Module) -> float:
        model.load_state_dict(model.state_dict())
        model.float().double()
        return 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.sweep(model, evaluate, WIDTHS)


def test_objects_that_are_not_functions_are_refused(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"evaluate must be a function of the model, got 0\.5"):
        gl.sweep(model, 0.5, WIDTHS)  # type: ignore[arg-type]


def test_a_missing_width(table: gl.Table) -> None:
    with pytest.raises(KeyError, match=r"no row for \(w, a\) = \(3, 3\); there are \[\(8, 8\)"):
        table[3, 3]


def test_text(table: gl.Table) -> None:
    assert str(table).splitlines()[:3] == [
        "    w      a  value",
        "    8      8  88.0000",
        "float      4  4.0000",
    ]


def test_csv_and_json_hold_all_of_it(table: gl.Table, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        read = [
            Row(int(r["w"]) if r["w"] else None, int(r["a"]) if r["a"] else None, float(r["value"]))
            for r in csv.DictReader(file)
        ]
    assert read == table.rows
    table.to_json(tmp_path / "table.json")
    assert [Row(**r) for r in json.loads((tmp_path / "table.json").read_text())] == table.rows


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_null_for_non_finite_values(value: float, tmp_path: Path) -> None:
    gl.Table([Row(4, None, value)]).to_json(tmp_path / "table.json")
    read = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert read == [{"w": 4, "a": None, "value": None}]


@pytest.mark.parametrize("value", [None, "high", torch.ones(2)])
def test_a_result_that_is_not_a_number_is_an_error_that_shows_it(value: object) -> None:
    model = gl.convert(nn.Sequential(nn.Linear(2, 2))).eval()
    gl.calibrate(model, [torch.ones(1, 2)])
    with pytest.raises(TypeError, match=r"^sweep: evaluate must return one number, got "):
        gl.sweep(model, lambda m: value, [(4, 4)])
    with pytest.raises(TypeError, match=r"^sensitivity: evaluate must return one number, got "):
        gl.sensitivity(model, lambda m: value)
    with pytest.raises(TypeError, match=r"^search: evaluate must return one number, got "):
        gl.search(model, lambda m: value, size=3, higher_is_better=True)


def test_plot_writes_an_image(table: gl.Table, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table.plot(tmp_path / "table.png", title="a title")
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_an_exception_restores_the_widths(model: nn.Module) -> None:
    def fail(model: nn.Module) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gl.sweep(model, fail, WIDTHS)
    assert of_widths(model) == 0


@pytest.mark.parametrize("widths", [[8], [(8, 8, 8)], ["88"]])
def test_objects_that_are_not_pairs_are_refused(model: nn.Module, widths: list[object]) -> None:
    with pytest.raises(TypeError, match="a width must be a pair"):
        gl.sweep(model, of_widths, widths)


def test_no_widths_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="widths is empty"):
        gl.sweep(model, of_widths, [])


def squares(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
    x, y = batch
    with torch.no_grad():
        return model(x).square().sum(), len(y)


def test_one_pass_over_the_data_gives_the_same_results_as_many(model: nn.Module) -> None:
    x, y = VGG.batch()
    parts = list(zip(x.split(4), y.split(4), strict=True))  # of unequal sizes
    times_read = []

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        times_read.append(1)
        yield from parts

    def mean_square(model: nn.Module) -> float:
        return sum(float(squares(model, part)[0]) for part in parts) / len(y)

    widths = [(8, 8), (3, 3), (2, 2), (None, None)]
    table = gl.sweep(model, squares, widths, batches=batches())
    assert table.rows == gl.sweep(model, mean_square, widths).rows
    assert len(times_read) == 1
    assert len({row.value for row in table.rows}) == len(widths)
    assert of_widths(model) == 0


def test_one_pass_needs_batches_and_pairs(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="got no batches"):
        gl.sweep(model, squares, WIDTHS, batches=iter([]))
    with pytest.raises(TypeError, match=r"evaluate must return \(sum, count\), got 1\.0"):
        gl.sweep(model, lambda model, batch: 1.0, WIDTHS, batches=[VGG.batch()])
    assert of_widths(model) == 0


def logits(model: nn.Module) -> float:
    assert not torch.is_grad_enabled()
    return float(model(VGG.batch()[0]).double().sum())


@pytest.mark.parametrize("workers", [2, 3])
@torch.no_grad()
def test_workers_get_the_same_results_as_one(model: nn.Module, workers: int) -> None:
    threads = torch.get_num_threads()
    assert gl.sweep(model, logits, WIDTHS, workers=workers).rows == gl.sweep(model, logits, WIDTHS).rows
    assert torch.get_num_threads() == threads
    assert {q.bits for q in model.modules() if hasattr(q, "bits")} == {None}


def test_workers_run_at_once_and_share_the_weights(model: nn.Module) -> None:
    meeting = threading.Barrier(2, timeout=30)
    weights = set()

    def evaluate(replica: nn.Module) -> float:
        meeting.wait()
        weights.add(replica.get_submodule("0").weight.data_ptr())
        return 0.0

    gl.sweep(model, evaluate, WIDTHS, workers=2)
    assert weights == {model.get_submodule("0").weight.data_ptr()}


def test_workers_compute_under_the_autocast_of_the_caller(model: nn.Module) -> None:
    def is_half(_: nn.Module) -> bool:
        x = torch.ones(1, 1)
        return (x @ x).dtype == torch.bfloat16

    with torch.autocast("cpu", torch.bfloat16):
        assert all(row.value for row in gl.sweep(model, is_half, WIDTHS, workers=2).rows)
    assert not any(row.value for row in gl.sweep(model, is_half, WIDTHS, workers=2).rows)


def test_an_error_of_a_worker_is_raised(model: nn.Module) -> None:
    def evaluate(_: nn.Module) -> float:
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        gl.sweep(model, evaluate, WIDTHS, workers=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be 1 or more"),
        ({"workers": 2, "batches": [1]}, "cannot share batches"),
    ],
)
def test_invalid_numbers_of_workers(model: nn.Module, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gl.sweep(model, logits, WIDTHS, **arguments)


def test_workers_refuse_training_mode(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="training mode"):
        gl.sweep(model.train(), logits, WIDTHS, workers=2)


def test_layers_that_no_evaluation_called_are_named() -> None:
    class ByFunction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.linear(x, self.inner.weight)
            return nn.functional.linear(y if y.sum() > 0 else -y, self.outer.weight)

    model, x = gl.convert(ByFunction().eval().requires_grad_(False)), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"sweep: inner, outer were not called, so nothing was quantized"):
        gl.sweep(model, lambda m: float(m(x).sum()), widths=[(8, None), (2, None)])
