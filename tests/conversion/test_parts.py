"""Separately called parts of a converted model equal those of the original."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.conversion.runs import assert_equal_runs, assert_equal_steps, loss_of
from tests.conversion.small import TWO_BLOCKS, TwoBlocks
from tests.gradients import assert_gradients
from tests.networks import MOBILENET, Separable

Cut = Callable[[nn.Module], nn.Module]


class Getter(nn.ModuleDict):
    """Runs children in order and returns what the named ones return, as torchvision's getter does."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(OrderedDict(list(model.named_children())[:-1]))
        self.names = names

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {}
        for name, module in self.items():
            x = module(x)
            if name in self.names:
                outputs[name] = x
        return outputs


class Summed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return sum(y.mean((1, 2, 3)) for y in self.inner(x).values())


CUTS: dict[str, Cut] = {
    "all but the head": lambda m: nn.Sequential(*list(m.children())[:-2]),
    "children one by one": lambda m: nn.Sequential(*m.stem, *list(m.blocks)),
    "a slice of a Sequential": lambda m: nn.Sequential(m.stem, m.blocks[:1]),
    "a getter of features": lambda m: Summed(Getter(m, ("stem", "blocks"))),
    "layers of a block": lambda m: nn.Sequential(
        m.stem, m.blocks[0].conv1, m.blocks[0].bn1, m.blocks[0].relu
    ),
    "head replaced by Identity": lambda m: _with_identity(m),
}


def _with_identity(model: nn.Module) -> nn.Module:
    model.fc = nn.Identity()
    return model


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_part_equals_the_part_of_the_original(cut: str, training: bool) -> None:
    x = TWO_BLOCKS.batch()[0]
    plain = TWO_BLOCKS.make().train(training)
    converted = CUTS[cut](gl.convert(plain)).train(training)
    assert_equal_runs(CUTS[cut](plain), converted, x)


@pytest.mark.parametrize("cut", CUTS)
def test_a_part_is_penalised_by_itself(cut: str) -> None:
    x = TWO_BLOCKS.batch()[0]
    plain, converted = (CUTS[cut](m) for m in (TWO_BLOCKS.make(), gl.convert(TWO_BLOCKS.make())))
    assert_equal_steps(plain, converted, loss_of(x))


@pytest.mark.parametrize("when", ["before a step", "after steps"])
def test_every_module_by_itself_equals_its_original_while_the_whole_is_armed(when: str) -> None:
    seen: list[tuple[str, Tensor]] = []
    plain, x = TWO_BLOCKS.make().eval(), TWO_BLOCKS.batch()[0]
    for name, module in plain.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0].detach())))
    plain(x)
    converted = gl.convert(TWO_BLOCKS.make().eval())
    penalty = gl.GradL1(converted, 0.1, 0.1)
    for _ in range(2 if when == "after steps" else 0):
        penalty(TWO_BLOCKS.loss(converted))
    for name, given in seen:
        ours, theirs = (m.get_submodule(name)(given) for m in (converted, TWO_BLOCKS.make().eval()))
        assert_gradients([ours], [theirs], 1e-12)


def test_two_parts_called_in_another_order() -> None:
    def shuffled(model: nn.Module) -> nn.Module:
        return nn.Sequential(model.stem, model.scale, model.blocks[1], model.blocks[0], model.blocks[1])

    x = MOBILENET.batch()[0]
    plain, converted = (shuffled(m) for m in (MOBILENET.make(), gl.convert(MOBILENET.make())))
    assert isinstance(converted[2], Separable)
    assert_equal_steps(plain, converted, loss_of(x))


def test_a_part_inside_a_new_model_of_float_layers() -> None:
    class Detector(nn.Module):
        def __init__(self, backbone: TwoBlocks) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.backbone, self.neck = backbone, nn.Conv2d(6, 8, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            deep = self.backbone.blocks(self.backbone.stem(x))
            return self.neck(deep).mean((2, 3))

    x = TWO_BLOCKS.batch()[0]
    plain = Detector(TWO_BLOCKS.make())
    converted = gl.convert(Detector(gl.convert(TWO_BLOCKS.make())))
    assert_equal_steps(plain, converted, loss_of(x))
