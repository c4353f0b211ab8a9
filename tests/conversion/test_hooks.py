"""Hooks and replaced forward passes get the same arguments as in the original, also in penalised steps."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from tests.conversion.runs import assert_same, built, loss_of, penalised, truth
from tests.conversion.small import TWO_BLOCKS
from tests.gradients import assert_gradients

HOOKED = (
    *("", "stem", "stem.0", "stem.1", "stem.2", "blocks", "fc"),
    *("blocks.1", "blocks.1.bn1", "blocks.1.relu", "blocks.1.conv2"),
    *("blocks.1.shortcut", "blocks.1.shortcut.1", "blocks.0.shortcut"),
)
each_module = pytest.mark.parametrize("name", HOOKED)
Seen = list[Tensor]


def look(module: nn.Module, seen: Seen) -> list[torch.utils.hooks.RemovableHandle]:
    return [
        module.register_forward_hook(lambda _, args, out: seen.append(out.detach().clone())),
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone())),
    ]


def seen_by(model: nn.Module, name: str, *, pass_: Callable[[nn.Module], object]) -> Seen:
    seen: Seen = []
    handles = look(model.get_submodule(name), seen)
    pass_(model)
    for handle in handles:
        handle.remove()
    return seen


def armed(model: nn.Module) -> None:
    penalty = gl.GradL1(model, 0.1, 0.1)
    penalty(TWO_BLOCKS.loss(model))


@each_module
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_hook_set_after_conversion_gets_the_same_arguments_as_in_the_original(
    name: str, training: bool
) -> None:
    plain, converted = TWO_BLOCKS.make().train(training), gl.convert(TWO_BLOCKS.make().train(training))
    theirs = [seen_by(plain, name, pass_=TWO_BLOCKS.loss) for _ in range(3)]
    ours = [
        seen_by(converted, name, pass_=TWO_BLOCKS.loss),
        seen_by(converted, name, pass_=armed),
        seen_by(converted, name, pass_=armed),
    ]
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) == 2
        assert_gradients(one, other, 1e-10)


@each_module
def test_a_hook_set_before_conversion_is_kept(name: str) -> None:
    seen: Seen = []
    plain = TWO_BLOCKS.make()
    look(plain.get_submodule(name), seen)
    armed(gl.convert(plain))
    assert len(seen) == 2
    assert_gradients(seen, seen_by(TWO_BLOCKS.make(), name, pass_=TWO_BLOCKS.loss), 1e-10)


@each_module
def test_a_hook_added_and_removed_between_penalised_steps(name: str) -> None:
    """Its output counts while it is there, and no longer."""
    x = TWO_BLOCKS.batch()[0]
    plain, converted = TWO_BLOCKS.make(), gl.convert(TWO_BLOCKS.make())
    for hooked in (False, True, False, True, True, False):
        handles = [
            m.get_submodule(name).register_forward_hook(lambda _, args, out: 1.5 * out)
            for m in (plain, converted)
            if hooked
        ]
        assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))
        for handle in handles:
            handle.remove()


@each_module
def test_a_backward_hook_sees_the_gradients_of_the_original(name: str) -> None:
    results = []
    for model in (TWO_BLOCKS.make().eval(), gl.convert(TWO_BLOCKS.make().eval())):
        seen: Seen = []
        if isinstance(model.fc, gl.QLinear):
            armed(model)  # there are plans now
        model.get_submodule(name).register_full_backward_hook(
            lambda _, i, out, seen=seen: seen.append(out[0])
        )
        penalty = gl.GradL1(model, 0.1, 0.0) if isinstance(model.fc, gl.QLinear) else None
        TWO_BLOCKS.loss(model).backward()
        assert len(seen) == 1
        results.append(seen)
        del penalty
    assert_gradients(*results, 1e-10)


def halved(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x) * 0.5


def test_a_forward_that_is_replaced_and_restored_later() -> None:
    x = TWO_BLOCKS.batch()[0]
    plain, converted = TWO_BLOCKS.make(), gl.convert(TWO_BLOCKS.make())
    for name in ("blocks.1", "blocks.1.bn1", "blocks.1.relu", "stem.2", ""):
        for replaced in (False, True, False):
            for model in (plain, converted):
                module = model.get_submodule(name)
                if replaced:
                    module.forward = MethodType(halved, module)
                else:
                    vars(module).pop("forward", None)
            assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))


def test_a_class_whose_forward_is_patched_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x = TWO_BLOCKS.batch()[0]
    plain, converted = TWO_BLOCKS.make(), gl.convert(TWO_BLOCKS.make())
    block = type(plain.blocks[0])
    own = block.forward
    assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))
    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", lambda self, x: own(self, x) * 0.5)
        assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))
    assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))


def test_global_module_hooks_run_in_a_penalised_step() -> None:
    converted, seen = gl.convert(TWO_BLOCKS.make()), []
    armed(converted)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: seen.append(type(m).__name__)
    )
    try:
        armed(converted)
        assert {"BatchNorm2d", "ReLU", "BasicBlock", "QConv2d", "TwoBlocks"} <= set(seen)
    finally:
        handle.remove()
    seen.clear()
    armed(converted)
    assert not seen


def test_hooks_compute_the_same_gradient_maps_as_in_the_original() -> None:
    """As class activation maps take them: activations by a forward hook, gradients by a tensor hook."""
    results = []
    for model in (TWO_BLOCKS.make().eval(), gl.convert(TWO_BLOCKS.make().eval())):
        kept: dict[str, Tensor] = {}

        def keep(_: nn.Module, args: tuple[Tensor], out: Tensor, kept: dict[str, Tensor] = kept) -> None:
            kept["activation"] = out.detach()
            out.register_hook(lambda g: kept.update(gradient=g.detach()))

        model.blocks[-1].register_forward_hook(keep)
        model(TWO_BLOCKS.batch()[0])[:, 1].sum().backward()
        results.append([kept["activation"], kept["gradient"]])
    assert_gradients(*results, 1e-12)


def test_a_hook_on_an_inner_block_of_a_composed_model() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Conv2d(4, 2, 1)
        )
        model[1].register_forward_hook(lambda module, args, out: 2 * out)
        return model

    x = torch.randn(2, 4, 3, 3).double()
    plain, converted = built(make), gl.convert(built(make))
    for _ in range(2):
        assert_same(penalised(converted, loss_of(x)), truth(plain, loss_of(x)))
