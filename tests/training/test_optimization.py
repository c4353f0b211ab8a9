"""Optimizers, schedule and averages."""

import math

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.training.config import Optimizer
from gradl1_fast.training.loop.optimization import Average, add_parameters, optimizer_for, schedule_for


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def rates(settings, epochs, steps):
    optimizer = optimizer_for(model(), settings)
    schedule = schedule_for(optimizer, settings, epochs, steps)
    found = []
    for _ in range(epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.filterwarnings("error")
def test_the_rate_rises_along_a_line_and_falls_along_a_cosine():
    found = rates(Optimizer("sgd", 0.1, warmup_epochs=1), epochs=3, steps=4)
    rise = [0.1 * (1 / 5 + (1 - 1 / 5) * n / 4) for n in range(4)]
    fall = [0.05 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    assert found == pytest.approx(rise + fall)


def test_without_a_rise_it_begins_at_its_highest():
    assert rates(Optimizer("adam", 0.2), epochs=2, steps=3)[0] == 0.2


@pytest.mark.parametrize("added_at", [0, 2, 4, 7])
@pytest.mark.parametrize("warmup", [0, 1])
def test_parameters_that_are_added_have_the_rate_of_the_others(warmup, added_at):
    network = model()
    optimizer = optimizer_for(network, settings := Optimizer("sgd", 0.1, warmup_epochs=warmup))
    schedule = schedule_for(optimizer, settings, epochs=3, steps=4)
    for step in range(12):
        if step == added_at:
            network.register_parameter("alpha", nn.Parameter(torch.ones(1)))
            add_parameters(optimizer, schedule, network)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1, step
        optimizer.step()
        schedule.step()
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_each_optimizer_has_its_numbers(name, kind):
    group = optimizer_for(model(), Optimizer(name, 0.3, momentum=0.7, weight_decay=0.2)).param_groups[0]
    assert type(optimizer_for(model(), Optimizer(name))) is kind
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)
    assert len(group["params"]) == 4  # weight decay is of biases and norms as well
    if name == "sgd":
        assert (group["momentum"], group["nesterov"]) == (0.7, True)


def test_the_average_follows_its_definition():
    net, key = model(), "0.weight"
    average = Average(net, 0.5)
    expected = net[0].weight.detach().clone()
    for update in range(12):
        with torch.no_grad():
            net[0].weight.add_(1)
            net[1].num_batches_tracked.add_(1)
        decay = min(0.5, (update + 1) / (update + 10))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
        average.update(net)
    torch.testing.assert_close(average.state[key], expected)
    assert average.state["1.num_batches_tracked"] == 12


def test_no_average_is_updated_at_a_bit_width():
    net = gl.convert(model())
    average = Average(net, 0.5)
    with (
        gl.bits(net, w=4, a=None),
        pytest.raises(RuntimeError, match=r"at a bit width: call gradl1_fast.set_bits"),
    ):
        average.update(net)
    assert average.updates == 0
    average.update(net)
    assert average.updates == 1


def test_it_is_applied_for_a_while():
    net = model()
    average = Average(net, 0.5)
    old = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(1)
    new = net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), average.applied(net):
        check_and_raise(net, old)
    assert torch.equal(net[0].weight, new)


def check_and_raise(net, old):
    assert torch.equal(net[0].weight, old)
    raise RuntimeError("inside")
