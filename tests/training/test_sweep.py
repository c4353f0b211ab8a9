"""A finished run at every width: the command, its numbers and its page."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import gradl1_fast as gl
from gradl1_fast.cli import app
from gradl1_fast.nn.sites import named_quantizers
from gradl1_fast.training import data
from gradl1_fast.training.config import Config, Model
from gradl1_fast.training.loop.simple import accuracy
from gradl1_fast.training.runs import folder as runs
from gradl1_fast.training.runs import sweep

CONFIG = Config(model=Model(width=4))
DIGITS = data.load("digits")
WIDE = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}


def network():
    torch.manual_seed(0)
    model = runs.network(CONFIG, 10, 1)
    for _ in range(3):
        model(DIGITS.train[0][:200])  # statistics of batch norms
    gl.calibrate(model, [DIGITS.train[0]])
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run that was never trained."""
    run = runs.Folder(tmp_path_factory.mktemp("run"))
    run.write_config(CONFIG)
    run.write_model(network(), DIGITS)
    return run.path


def gradl1(*args):
    return CliRunner(env=WIDE).invoke(app, list(map(str, args)))


@pytest.fixture(scope="module")
def results():
    settings = sweep.Settings(bits=(None, 8, 3), images=150, size=1500.0, fold=True)
    return sweep.run(network(), DIGITS, settings, progress=False)


def test_accuracies_are_those_of_the_same_images(results):
    images, labels = DIGITS.test
    places = torch.linspace(0, len(labels) - 1, 150).round().long()
    model = gl.fold_batch_norm(network()).model
    for w, a in ((8, 8), (3, None)):
        with gl.bits(model, w=w, a=a):
            assert results.table[w, a] == pytest.approx(accuracy(model, (images[places], labels[places])))
    assert results.images == 150
    assert len(results.table.rows) == 9


def test_every_tensor_has_its_loss_its_range_and_its_norm(results):
    weights = {f"{row.name}.weight" for row in results.alone.rows if row.kind == "w"}
    activations = {row.name for row in results.alone.rows if row.kind == "a"}
    assert results.ends.keys() == weights | activations
    assert results.norms.keys() == weights | (activations - {"0.input"})  # the images
    assert all(low <= high for low, high in results.ends.values())
    assert results.plan.best.cost <= 1500
    assert results.folding.difference < 1e-4


def test_norms_are_step_times_gradient(results):
    model = gl.fold_batch_norm(network()).model
    images, labels = DIGITS.train
    places = torch.linspace(0, len(labels) - 1, 200).round().long()
    loss = torch.nn.functional.cross_entropy(model(images[places]), labels[places])
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, gl.nn.QuantizedLayer))
    (grad,) = torch.autograd.grad(loss, [layer.weight])
    expected = float(grad.abs().sum() * layer.weight.detach().abs().max() / 7)
    assert results.norms[f"{name}.weight"] == pytest.approx(expected, rel=1e-4)


def test_ranges_from_batch_norms_take_the_images_as_known():
    model = network()
    settings = sweep.Settings(bits=(8,), images=20, ranges="batch_norm", weight_ranges="mse")
    found = sweep.run(model, DIGITS, settings, progress=False)
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    six = float((norm.bias + 6 * norm.weight.abs()).detach().max())
    fed = [m for m in model.modules() if isinstance(m, gl.nn.QuantizedLayer)][1]
    assert float(fed.input_quantizer.high) == pytest.approx(six)
    assert next(m for m in model.modules() if isinstance(m, gl.nn.WeightQuantizer)).clip is not None
    assert found.plan is None


def test_what_costs_no_training_is_done_at_every_width():
    model, (images, labels) = network(), DIGITS.test
    settings = sweep.Settings(bits=(None, 3), images=150, prepare=True)
    found = sweep.run(model, DIGITS, settings, progress=False)
    places = torch.linspace(0, len(labels) - 1, 150).round().long()
    train = DIGITS.train[0]
    batches = train[torch.linspace(0, len(train) - 1, min(1000, len(train))).round().long()].split(200)
    one = gl.prepare(model, batches, w=3, a=3, rounding=None).model
    gl.round_weights(one, batches, w=3)
    for w, a in ((3, 3), (3, None)):
        with gl.bits(one, w=w, a=a):
            gl.reestimate_batch_norm(one, batches)
            expected = accuracy(one, (images[places], labels[places]))
        assert found.table[w, a] == pytest.approx(expected)
    assert found.table[None, 3] == pytest.approx(
        accuracy(gl.prepare(model, batches, w=None, a=3).model, (images[places], labels[places]))
    )
    assert next(m for m in model.modules() if isinstance(m, gl.nn.WeightQuantizer)).axis is None


def test_the_command_prints_the_table_and_writes_the_page(folder):
    result = gradl1(
        "sweep", folder, "--bits", "float, 8,3", "--images", "100", "--size", "2000", "--no-prepare"
    )
    assert result.exit_code == 0, result.output
    assert "Test accuracy in %" in result.output
    assert "A width for each layer" in result.output
    done = [line.partition(":")[0] for line in result.stderr.splitlines() if " done in " in line]
    assert list(dict.fromkeys(done)) == ["sensitivity", "verify", "sweep"]
    assert (folder / "sweep.html").read_text().startswith("<!doctype html>")
    model = runs.load(folder).model
    with gl.bits(model, w=8, a=8):
        images, labels = DIGITS.test
        places = torch.linspace(0, len(labels) - 1, 100).round().long()
        assert f"{accuracy(model, (images[places], labels[places])):.2f}" in result.output


def test_help_says_that_simulation_is_slower():
    output = gradl1("sweep", "--help").output
    assert "slower than float" in output
    assert "gradl1 sweep runs/digits" in output


WRONG = {
    "no run": (("{empty}",), "not the folder of a finished run"),
    "bits": (("{run}", "--bits", "8,17"), "--bits: widths are float or numbers from 1 to 16"),
    "words": (("{run}", "--bits", "8;4"), "--bits: widths are float or numbers"),
    "ranges": (("{run}", "--ranges", "best"), "ranges must be one of"),
    "weights": (("{run}", "--weight-ranges", "batch_norm"), "supports activations only"),
    "alone": (("{run}", "--alone", "17", "--images", "10"), "must be from 1 to 16"),
    "budget": (("{run}", "--size", "1", "--images", "10", "--bits", "8"), "the narrowest choice costs"),
}


def test_what_can_be_refused_is_refused_before_the_sweep(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda *_, **__: pytest.fail("swept"))
    for wrong in (sweep.Settings(alone=0, images=10), sweep.Settings(size=1.0, images=10)):
        with pytest.raises(ValueError, match=r"must be from 1 to 16|the narrowest choice costs"):
            sweep.run(network(), DIGITS, wrong, progress=False)


def test_ranges_from_batch_norms_that_are_then_folded():
    model = network()
    settings = sweep.Settings(bits=(8,), images=10, ranges="batch_norm", fold=True)
    ends = sweep.run(model, DIGITS, settings, progress=False).ends
    inputs = {name: ends[name] for name, q in named_quantizers(model).items() if q.is_input}
    gl.calibrate(model, ranges=gl.ranges.BatchNormStatistics(known=inputs))
    for name, quantizer in named_quantizers(model).items():
        assert ends[name] == (float(quantizer.low), float(quantizer.high))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named_in_one_sentence(case, folder, tmp_path):
    args, message = WRONG[case]
    filled = [arg.format(run=folder, empty=tmp_path) for arg in args]
    result = gradl1("sweep", *filled, "--out", tmp_path / "page.html")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("gradl1: ")
    assert message in result.output
    assert not (tmp_path / "page.html").exists()
