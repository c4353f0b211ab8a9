"""How a step is computed: precision, accumulation, recomputation, compilation; and what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.penalty.measured import activation_sites
from gradl1_fast.training.config import Config, Optimizer, Penalty, Training
from gradl1_fast.training.data import digits
from gradl1_fast.training.loop.ranks import Ranks
from gradl1_fast.training.loop.recompute import recomputing
from gradl1_fast.training.loop.steps import CompiledGradients
from gradl1_fast.training.loop.trainer import Trainer, TrainingError
from gradl1_fast.training.methods import make
from gradl1_fast.training.models import digits_net
from tests.conversion.runs import without_noise
from tests.gradients import assert_gradients
from tests.networks import NETWORKS

DATA = tuple(part[:120] for part in digits(0).train)
GRADL1 = {"lambda_w": 0.01, "lambda_a": 0.01, "scale": "step"}


def config(method="gradl1", settings=None, optimizer=None, **training):
    whole = {"epochs": 1, "batch_size": 30, **training}
    settings = GRADL1 if settings is None and method == "gradl1" else settings or {}
    return Config(
        optimizer=optimizer or Optimizer(),
        training=Training(**whole),
        penalty=Penalty(method, 1, 0, settings),
    )


def trainer(settings, net=None, data=DATA):
    torch.manual_seed(1)
    return Trainer(gl.convert(digits_net(4) if net is None else net), data, settings)


def gradients(made):
    x, y = made.batch(0)
    count = made.config.training.accumulate
    made.optimizer.zero_grad()
    terms = made.gradients(
        made.objective, list(zip(x.chunk(count), y.chunk(count), strict=True)), made.scaler
    )
    return terms, [p.grad.clone() for p in made.model.parameters()]


# Accumulation


def test_accumulated_gradients_are_the_mean_over_the_parts():
    made = trainer(config(accumulate=3))
    terms, found = gradients(made)
    x, y = made.batch(0)
    losses, penalties, sums = [], [], None
    net = trainer(config()).model
    for part in zip(x.chunk(3), y.chunk(3), strict=True):
        penalty = gl.GradL1(net, 0.01, 0.01, scale="step")
        loss = F.cross_entropy(net(part[0]), part[1])
        extra = penalty(loss)
        grads = torch.autograd.grad(loss + extra, list(net.parameters()))
        sums = grads if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
        losses.append(loss.detach())
        penalties.append(extra.detach())
    assert_gradients(found, [value / 3 for value in sums], 1e-5)
    torch.testing.assert_close(terms.loss, torch.stack(losses).mean())
    torch.testing.assert_close(terms.penalty, torch.stack(penalties).mean())


def test_a_norm_is_the_mean_over_the_parts_that_measured_it():
    made = trainer(config(settings={**GRADL1, "every": 2}, accumulate=2))
    terms, _ = gradients(made)
    assert terms.parts.keys() == made.objective.penalty.terms.keys()
    for name, value in made.objective.penalty.terms.items():
        torch.testing.assert_close(terms.parts[name], 2 * value)  # measured on half the loss of the second


# Precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_low_precision_the_penalty_is_summed_in_float32(precision):
    made = trainer(config(precision=precision))
    scale = 256.0 if precision == "float16" else 1.0
    if (
        precision == "float16"
    ):  # that of the beginning is found to be too large, and halved, in the first steps
        made.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    terms, found = gradients(made)
    exact, expected = gradients(trainer(config()))
    assert terms.penalty.dtype == terms.loss.dtype == torch.float32
    assert terms.penalty.item() == pytest.approx(exact.penalty.item(), rel=0.1)
    flat, reference = (torch.cat([g.flatten().double() for g in grads]) for grads in (found, expected))
    assert F.cosine_similarity(flat / scale, reference, 0) > 0.95
    assert float(flat.norm()) / scale == pytest.approx(float(reference.norm()), rel=0.2)


class Overflowing(nn.Module):
    """Turns into infinity when asked to."""

    def __init__(self):
        super().__init__()
        self.net, self.factor = digits_net(4), nn.Buffer(torch.ones(()))

    def forward(self, x):
        return self.net(x) * self.factor


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_step_with_infinity_is_skipped_not_applied(average):
    made = trainer(config(precision="float16", ema=average), Overflowing())
    after = []
    factors = [1.0, float("inf"), 1.0, 1.0]

    def after_step(made):
        after.append({name: p.detach().clone() for name, p in made.model.named_parameters()})
        if len(after) < len(factors):
            made.model.factor.fill_(factors[len(after)])

    scale = made.scaler.get_scale()
    made.run_epoch(after_step)
    assert len(after) == 4
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairwise(after)]
    assert changed == [False, True, True]
    assert made.scaler.get_scale() == scale / 2
    assert all(torch.isfinite(value).all() for value in after[-1].values())
    assert not torch.isfinite(made.seen.losses[1])


def stops_after(made, after_step=lambda made: None):
    """Return the message with which a training ends, and the steps that were told of before."""
    told = []
    with pytest.raises(TrainingError) as error:
        made.run_epoch(lambda made: (told.append(made.step), after_step(made)))
    return str(error.value), told


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_no_number_ends_the_training_at_once(precision):
    made = trainer(config(precision=precision), Overflowing())
    message, told = stops_after(made, lambda made: made.model.factor.fill_(float("nan")))
    assert message.startswith("the loss is nan since step 2 of epoch 1; a smaller learning rate")
    assert told == [1]
    with pytest.raises(TrainingError, match="since step 2"):
        made.state_dict()  # no checkpoint takes the place of the last good one


def test_a_penalty_that_is_no_number_ends_the_training_at_once():
    made = trainer(config())
    computed = made.gradients
    made.gradients = lambda *args: replace(computed(*args), penalty=torch.tensor(torch.inf))
    assert stops_after(made)[0].startswith("the penalty is inf since step 1 of epoch 1")


def test_where_a_look_has_to_wait_it_is_taken_at_intervals(monkeypatch):
    monkeypatch.setattr("gradl1_fast.training.loop.trainer.CHECK_EVERY", 3)
    made = trainer(config(), Overflowing())
    made.ranks = Ranks(0, 1, torch.device("meta"))  # any that is not a CPU
    monkeypatch.setattr(made, "batch", lambda step: tuple(part[:30] for part in DATA))
    message, told = stops_after(made, lambda made: made.model.factor.fill_(float("nan")))
    assert message.startswith("the loss is nan since step 2 of epoch 1")
    assert told == [1, 2]


def test_in_float16_training_ends_where_not_one_step_is_taken():
    made = trainer(config(precision="float16"), Overflowing())
    made.model.factor.fill_(float("inf"))
    message, told = stops_after(made)
    assert message.startswith("the loss is nan since step 1 of epoch 1")
    assert told == [1, 2, 3]
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


@pytest.mark.parametrize("every", [3, 50])
def test_in_float16_a_penalty_may_be_infinite_only_until_the_scale_fits(every, monkeypatch):
    monkeypatch.setattr("gradl1_fast.training.loop.trainer.CHECK_EVERY", every)
    made = trainer(config(precision="float16"))
    computed = made.gradients
    made.gradients = lambda *args: replace(computed(*args), penalty=torch.tensor(torch.inf))
    if every == 3:
        assert stops_after(made)[0].startswith("the penalty is inf since step 1 of epoch 1")
    else:
        made.run_epoch()


# Recomputation


@pytest.mark.parametrize("parts", [None, 1, 2, 100])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.id)
def test_recomputed_activations_give_the_same_gradients_and_statistics(network, parts):
    results = []
    for recomputed in (False, True):
        model = gl.convert(network.make())
        net = recomputing(model, parts) if recomputed else model
        penalty = gl.GradL1(model, 0.3, 0.2, scale="step")
        loss = network.loss(net)
        (loss + penalty(loss)).backward()
        gradients = without_noise(tuple(p.grad for p in model.parameters()))
        results.append((gradients, list(model.buffers())))
    assert_gradients(results[1][0], results[0][0], 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(results[1][1], results[0][1], strict=True))


def test_activations_are_not_kept():
    kept = []

    def pack(value):
        kept.append(value.untyped_storage().nbytes())
        return value

    model = gl.convert(digits_net(8))
    x = torch.randn(20, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model(x)
        plain, kept = sum(kept), []
        recomputing(model)(x)
    assert sum(kept) < plain / 2


METHODS = {
    "plain": {},
    "gradl1": GRADL1,
    "l2": {"lambda_w": 0.1, "lambda_a": 0.1},
    "kure": {"coefficient": 0.1},
    "defensive": {"beta": 0.01},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_recomputes(method):
    one, other = (trainer(config(method, METHODS[method], checkpointing=again)) for again in (False, True))
    # Fused loops add parts of a gradient in another order where a region ends.
    with gl.backend("reference"):
        for made in (one, other):
            made.run_epoch()
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:gradl1_fast.convert")
def test_a_model_without_a_graph_cannot_be_cut():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else self.conv(x) * 2

    with pytest.raises(
        ValueError, match=r"checkpointing needs a model whose forward pass can be traced.*control flow"
    ):
        recomputing(gl.convert(Untraceable()))


# Compilation


def small_net():
    torch.manual_seed(2)
    layers = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10)
    return nn.Sequential(*layers).double()


@pytest.mark.usefixtures("trace_autograd")
@pytest.mark.parametrize("method", ["plain", "gradl1"])
def test_a_compiled_step_equals_the_eager_one(method):
    results = []
    for compiled in (False, True):
        made = trainer(config(method, accumulate=2), small_net(), (DATA[0].double(), DATA[1]))
        if compiled:
            made.gradients = CompiledGradients(made.model, made.config, backend="aot_eager")
        terms, found = gradients(made)
        results.append((terms, found, list(made.model.buffers())))
    (eager, expected, buffers), (terms, found, others) = results
    assert_gradients(found, expected, 1e-10)
    assert_gradients([terms.loss, terms.penalty], [eager.loss, eager.penalty], 1e-12)
    assert terms.parts.keys() == eager.parts.keys()
    assert_gradients(list(terms.parts.values()), list(eager.parts.values()), 1e-10)
    for one, other in zip(buffers, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


REFUSED = {
    "compile sam": (config("sam", {"epsilon": 0.1}, compile=True), "the methods 'plain' and 'gradl1'"),
    "compile every": (
        config(settings={**GRADL1, "every": 2}, compile=True),
        "compile: the whole step must be",
    ),
    "compile fd": (
        config(settings={"lambda_w": 0.1, "method": "finite_difference"}, compile=True),
        "compile: the whole step must be one graph",
    ),
    "compile bf16": (
        config(compile=True, precision="bfloat16"),
        "compile does not go together with precision",
    ),
    "compile checkpointing": (config(compile=True, checkpointing=True), "not go together with checkpointing"),
    "graph on a CPU": (config(cuda_graph=True), "cuda_graph needs an NVIDIA GPU; this run computes on cpu"),
    "graph and compile": (config(cuda_graph=True, compile=True), "choose compile or cuda_graph, not both"),
    "checkpointing qat": (
        config("qat", {"w": 4, "a": 4}, checkpointing=True),
        "checkpointing: with the method 'qat'",
    ),
    "checkpointing fd": (
        config(settings={"lambda_w": 0.1, "method": "finite_difference"}, checkpointing=True),
        "checkpointing: with the method 'gradl1', as configured",
    ),
    **{
        f"{precision} fd": (
            config(settings={"lambda_w": 0.1, "method": "finite_difference"}, precision=precision),
            f"precision {precision} does not support the finite difference",
        )
        for precision in ("bfloat16", "float16")
    },
    "checkpointing sam": (
        config("sam", {"epsilon": 0.1}, checkpointing=True),
        "checkpointing: with the method 'sam'",
    ),
    "large batch": (config(batch_size=121), "batch_size: 121 is more than the 120 training images"),
    "method": (config("lasso"), "method must be one of plain"),
    "settings": (config(settings={"lambda_x": 1.0}), "settings are lambda_w"),
    "value": (config(settings={"lambda_w": -1.0}), "lambda_w must be finite and 0 or more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_before_the_first_step(name):
    settings, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(settings)


def test_a_rising_coefficient_is_no_graph_that_is_the_same_each_time():
    settings = Config(training=Training(2, 30, compile=True), penalty=Penalty("gradl1", 2, 1, GRADL1))
    with pytest.raises(ValueError, match="would need a new graph in every step"):
        trainer(settings)


# Armed steps


def armed_in_each_forward_pass(made):
    """Return, for each layer and each pass of an epoch, whether a penalty was waiting for the pass."""
    seen = {name: [] for name in named_layers(made.model)}
    handles = [
        layer.register_forward_pre_hook(lambda layer, _, name=name: seen[name].append(layer.arming.armed))
        for name, layer in named_layers(made.model).items()
    ]
    made.run_epoch()
    made.next_epoch()
    for handle in handles:
        handle.remove()
    return list(seen.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_armed_in_the_steps_that_are_due_alone(checkpointing):
    settings = Config(
        training=Training(3, 30, checkpointing=checkpointing),
        penalty=Penalty("gradl1", 2, 0, {**GRADL1, "every": 2}),
    )
    made = trainer(settings)
    passes = 2 if checkpointing else 1  # of an ordinary step
    plain = armed_in_each_forward_pass(made)
    assert all(armed == 4 * passes * [False] for armed in plain)
    for armed in (armed_in_each_forward_pass(made), armed_in_each_forward_pass(made)):
        assert all(set(layer[:passes]) == {False} for layer in armed)
        assert all(layer.count(False) == 2 * passes for layer in armed)
        assert all(layer.count(True) >= 2 * passes for layer in armed)
        assert all(layer[passes] for layer in armed)


def test_a_training_without_a_penalty_never_arms():
    made = trainer(config("plain", {}))
    assert all(armed == 4 * [False] for armed in armed_in_each_forward_pass(made))


def test_lambdas_of_zero_disarm_between_two_due_steps():
    model = gl.convert(small_net())
    objective = make("gradl1", model, lambda_w=0.1, lambda_a=0.1, every=2)
    x, y = DATA[0].double(), DATA[1]
    seen = []

    def closure():
        seen.append({layer.arming.armed for layer in named_layers(model).values()})
        return F.cross_entropy(model(x), y)

    for _ in range(4):
        objective.backward(closure)
    assert seen == [{False}, {True}, {False}, {True}]


# The order of things


def test_a_penalty_that_cannot_be_made_is_refused_before_the_plain_epochs():
    settings = Config(training=Training(3, 30), penalty=Penalty("gradl1", 1, 0, {"lambda_w": "much"}))
    with pytest.raises(TypeError, match="lambda_w must be a number, got 'much'"):
        trainer(settings)


def test_the_penalty_begins_with_its_epoch_and_rises():
    settings = Config(training=Training(4, 30), penalty=Penalty("gradl1", 2, 1, GRADL1))
    made = trainer(settings)
    strengths, names = [], []
    while not made.done:
        made.run_epoch(
            lambda made: (strengths.append(made.objective.strength), names.append(made.objective.name))
        )
        made.next_epoch()
    assert names == ["plain"] * 8 + ["gradl1"] * 8
    assert strengths[8:] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_nothing_of_the_penalty_stays_in_the_model():
    made = trainer(config())
    made.run_epoch()
    made.next_epoch()
    made.objective.close()
    assert not any(site.quantizer.is_measured for site in activation_sites(made.model))
    assert not any(layer.arming.armed for layer in named_layers(made.model).values())


def test_objectives_are_those_of_the_library():
    assert trainer(config()).objective.name == make("gradl1", gl.convert(digits_net(4)), lambda_w=0.1).name
