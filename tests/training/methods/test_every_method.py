"""What holds for every method: its declaration, one small training, a kill and a resume, and the end."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import gradl1_fast as gl
from docs_site import methods_table
from gradl1_fast.training import methods
from gradl1_fast.training.experiment.methods import VARIANTS, method_of, settings_of, text_of
from gradl1_fast.training.loop.optimization import Average
from gradl1_fast.training.methods import Composed, Family, Method, make
from gradl1_fast.training.runs import checkpoints
from tests.training.methods import small

each = pytest.mark.parametrize("name", small.NAMES)
each_class = pytest.mark.parametrize("cls", methods.METHODS.values(), ids=lambda cls: cls.name)
PACKAGE = Path(methods.__file__).parent


@each_class
def test_a_class_declares_the_interface(cls):
    assert isinstance(cls.family, Family)
    assert cls.text
    assert cls.variants
    assert cls.source or cls.name == "plain"
    assert cls.passes >= 1
    assert cls.__doc__
    if cls.source:
        assert "arXiv" in cls.__doc__, "the docstring names its source"
    assert ("econstruction" in cls.__doc__) == cls.reconstruction, "docstring and reconstruction disagree"


def test_every_file_with_a_method_holds_one_and_no_other_file_names_it():
    """A new method is a new file: nothing outside of it lists names."""
    found = {}
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        named = [
            statement.value.value
            for node in classes
            for statement in node.body
            if isinstance(statement, ast.Assign) and statement.targets[0].id == "name"
        ]
        assert len(named) <= 1, path
        found.update(dict.fromkeys(named, path))
    assert found.keys() == methods.METHODS.keys()


def test_a_name_is_registered_once():
    with pytest.raises(TypeError, match="the method 'plain' is Plain already"):

        class Other(Method):
            name = "plain"


@each
def test_the_small_training_ends_with_finite_numbers(name, trained):
    made = trained(name).trainer
    assert made.objective.name == method_of(name)
    assert len(made.seen.losses) == 3
    assert all(value.isfinite() for value in [*made.seen.losses, *made.seen.penalties])
    assert all(value.isfinite().all() for value in trained(name).state.values())


@each
def test_a_method_trains_the_weights(name, trained):
    """Another method, or none, gives other weights."""
    mine, plain = trained(name).state, trained("plain").state
    same = all(key in mine and torch.equal(mine[key], plain[key]) for key in plain)
    assert same == (name == "plain")


@each
def test_its_own_quantizer_computes_at_the_widths_it_was_trained_for(name, trained):
    result = trained(name)
    assert result.own.keys() == set(result.trainer.objective.widths)
    assert all(logits.isfinite().all() for logits in result.own.values())
    with pytest.raises(ValueError, match=r"\(w, a\) must be one of .*; got \(13, 13\)"):
        result.trainer.objective.quantized(13, 13).__enter__()


@pytest.mark.parametrize(
    ("name", "stop"),
    [*((name, 4) for name in small.NAMES), *((name, 2) for name in ("gradl1", "satnl", "direct-3"))],
)
def test_after_a_kill_it_goes_on_to_the_same_weights(name, stop, trained, tmp_path):
    stopped = small.advance(small.trainer(name), stop)
    checkpoints.save(tmp_path, stopped, stopped.state_dict(), [])
    torch.manual_seed(99)
    resumed = small.trainer(name)
    torch.rand(7)
    checkpoints.load(checkpoints.latest(tmp_path), resumed)
    small.advance(resumed, small.STEPS - stop)
    mine, whole = resumed.model.state_dict(), trained(name).state
    assert mine.keys() == whole.keys()
    assert all(torch.equal(mine[key], whole[key]) for key in whole)
    one, other = resumed.objective.state_dict(), trained(name).trainer.objective.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@each
def test_closing_leaves_an_ordinary_model(name):
    made = small.advance(small.trainer(name, ema=0.5), 4)
    plain = small.network()
    kinds = [type(module) for module in plain.modules()]
    model = made.finish()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in plain.named_parameters()]
    assert [type(module) for module in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())
    gl.calibrate(model, [small.IMAGES[0]])
    with gl.bits(model, w=4, a=4), torch.no_grad():
        assert model(small.IMAGES[0]).isfinite().all()
    with torch.no_grad():
        assert model(small.IMAGES[0]).isfinite().all()


def test_what_a_method_adds_to_the_model_is_optimized_at_the_scheduled_rate():
    """Parameters that appear in the middle have the rate of the others, and no weight decay."""

    class Added(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, weight):
            return weight * self.gain

    made = small.advance(small.trainer("plain", epochs=3, ema=0.5), 1)
    torch.nn.utils.parametrize.register_parametrization(made.model[0], "weight", Added())
    made._replace_objective()
    new = made.optimizer.param_groups[1]
    assert [tuple(p.shape) for p in new["params"]] == [()]
    assert new["weight_decay"] == 0
    small.advance(made, 3)
    assert new["lr"] == made.optimizer.param_groups[0]["lr"] == made.rate < 0.01
    assert float(new["params"][0].detach()) != 1
    assert made.average.state.keys() == made.model.state_dict().keys()


def test_an_average_follows_new_entries():
    model = torch.nn.Linear(1, 1)
    average = Average(model, 0.5)
    model.register_buffer("more", torch.full((), 3.0))
    average.follow(model)
    assert average.state["more"] == 3


# Combinations


def test_a_combination_minimises_the_sum():
    """Its gradient is that of gradl1 plus that of the kurtosis penalty, not of its gradient norm too."""
    grads = {}
    for name in ("plain", "gradl1", "kure", "gradl1+kure"):
        model = small.network().double()
        x, y = small.IMAGES[0].double(), small.IMAGES[1]
        method = make(method_of(name), model, **settings_of(name, small.RECIPE))
        terms = method.backward(
            lambda model=model, x=x, y=y: torch.nn.functional.cross_entropy(model(x), y),
            lambda loss: 4 * loss,
        )
        grads[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
        grads[name] = torch.cat([grads[name], 4 * terms.penalty.reshape(1), 4 * terms.loss.reshape(1)])
        method.close()
    expected = grads["gradl1"] + grads["kure"] - grads["plain"]
    torch.testing.assert_close(grads["gradl1+kure"], expected, rtol=1e-10, atol=1e-12)


class Recorded(Method):
    """A part of a combination that writes down its calls."""

    family = Family.LOSS

    def __init__(self, model, name, calls):
        super().__init__(model)
        self.name, self.calls = name, calls

    def added(self, loss):
        self.calls.append(f"{self.name} added at {self.strength}")
        return loss.new_zeros(())

    def after_step(self):
        self.calls.append(f"{self.name} after the step")

    def close(self):
        self.calls.append(f"{self.name} closed")


def test_a_combination_hands_everything_to_its_parts_and_closes_the_last_one_first():
    model, calls = torch.nn.Linear(1, 1), []
    both = Composed(model, [Recorded(model, "a", calls), Recorded(model, "b", calls)])
    both.strength = 0.5
    both.backward(lambda: model(torch.ones(1, 1)).sum())
    both.after_step()
    both.close()
    assert calls == [
        *("a added at 0.5", "b added at 0.5"),
        *("a after the step", "b after the step"),
        *("b closed", "a closed"),
    ]


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        (
            "gradl1+sam",
            {"gradl1.lambda_w": 1.0, "sam.epsilon": 0.1},
            ValueError,
            "gradl1 and sam runs its own",
        ),
        ("kure+kure", {"kure.coefficient": 1.0}, ValueError, "each part can be named once"),
        ("kure+magic", {}, ValueError, "method must be one of plain"),
        ("gradl1+kure", {"coefficient": 1.0}, TypeError, "name of its method before it.*got coefficient"),
        ("gradl1+kure", {"gradl1.lambda_w": 1.0}, TypeError, "method kure: missing.*coefficient"),
    ],
)
def test_what_cannot_be_combined_is_refused(name, settings, error, message):
    with pytest.raises(error, match=message):
        make(name, small.network(), **settings)


def test_a_refused_combination_leaves_the_model_as_it_was():
    model = small.network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TypeError, match="method kure"):
        make("qat+kure", model, **{"qat.w": 4, "qat.a": 4})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_combination_knows_what_its_parts_need():
    model = small.network()
    both = make("gradl1+kure", model, **{"gradl1.lambda_w": 1.0, "kure.coefficient": 1.0})
    assert isinstance(both, Composed)
    assert (both.passes, both.second_order, both.compilable, both.distributed) == (1, True, False, False)
    two = make("kure+defensive", small.network(), **{"kure.coefficient": 1.0, "defensive.beta": 1.0})
    assert two.distributed
    qat = make("qat+kure", small.network(), **{"qat.w": 4, "qat.a": 5, "kure.coefficient": 1.0})
    assert qat.widths == ((4, 5),)


# Documentation


def test_the_table_of_the_documentation_is_that_of_the_classes():
    page = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
    assert methods_table.put_into(page) == page, "run: python -m docs_site.methods_table"
    for name in VARIANTS:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert ("reconstruction" in row) == methods.METHODS[method_of(name)].reconstruction


def test_a_reconstruction_is_called_one_in_help_and_reports():
    for name in VARIANTS:
        assert ("(reconstruction)" in text_of(name)) == methods.METHODS[method_of(name)].reconstruction
