"""The penalty inside Lightning's automatic optimization equals a loop written by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradl1_fast as gl
from tests.networks import conv_norm

L = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
integration = pytest.importorskip("gradl1_fast.integrations.lightning")

SETTINGS = {"lambda_w": 0.05, "lambda_a": 0.02, "scale": "step"}


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [*conv_norm(1, 4), nn.ReLU(), *conv_norm(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)]
    return gl.convert(nn.Sequential(*layers))


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(24, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(24) % 3), batch_size=6)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer(*callbacks: Any, **options: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fitted(
    module: Any = None, settings: dict[str, Any] = SETTINGS, first_epoch: int = 0, **options: Any
) -> Any:
    module = module or Classifier()
    callback = integration.GradL1Callback(gl.GradL1(module.network, **settings), first_epoch)
    trainer(callback, **options).fit(module, loader())
    return module


def by_hand(epochs: int = 1, first_epoch: int = 0, parts: int = 1, autocast: bool = False) -> nn.Module:
    model = network()
    penalty = gl.GradL1(model, **SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        penalty.enabled = epoch >= first_epoch
        for place, (x, y) in enumerate(loader()):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y) / parts
            (loss + penalty(loss)).backward()
            if place % parts == parts - 1:
                optimizer.step()
                optimizer.zero_grad()
    return model


def python(*arguments: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, *arguments]
    subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, timeout=120)


def first_weight(model: nn.Module) -> Tensor:
    return model.get_submodule("0").weight


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, {}),
        ({"max_epochs": 2, "first_epoch": 1}, {"epochs": 2, "first_epoch": 1}),
        ({"accumulate_grad_batches": 2}, {"parts": 2}),
        ({"precision": "bf16-mixed"}, {"autocast": True}),
    ],
    ids=["plain", "from the second epoch", "accumulated", "bfloat16"],
)
def test_training_is_bitwise_equal_to_a_manual_loop(options: dict[str, Any], loop: dict[str, Any]) -> None:
    module = fitted(**options)
    assert_equal(module.network, by_hand(**loop))
    unpenalised = by_hand(**{**loop, "first_epoch": 9})
    assert not torch.equal(first_weight(module.network), first_weight(unpenalised))


def test_under_ddp_the_gradient_is_the_mean_of_the_ranks(tmp_path: Path) -> None:
    python("-m", "tests.integrations.two_ranks", str(tmp_path / "weights.pt"))
    trained = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = network()
    penalty = gl.GradL1(model, **SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in loader():
        for rank in range(2):
            loss = F.cross_entropy(model(x[rank::2]), y[rank::2]) / 2
            (loss + penalty(loss)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_the_callback_leaves_no_trace_and_logs_the_penalty() -> None:
    seen: list[Tensor] = []

    class Reader(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(trainer.callback_metrics["gradl1_penalty"])

    module = Classifier()
    penalty = gl.GradL1(module.network, **SETTINGS)
    trainer(integration.GradL1Callback(penalty), Reader()).fit(module, loader())
    assert "backward" not in vars(module)
    assert len(seen) == 4
    assert all(value > 0 for value in seen)


def test_an_overridden_backward_gets_loss_and_penalty() -> None:
    seen: list[Tensor] = []

    class Own(Classifier):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append(loss.detach())
            loss.backward()

    model = network()
    penalty = gl.GradL1(model, **SETTINGS)
    x, y = next(iter(loader()))
    loss = F.cross_entropy(model(x), y)
    fitted(Own())
    torch.testing.assert_close(seen[0], (loss + penalty(loss)).detach(), rtol=0, atol=0)


def test_a_penalty_that_would_be_lost_is_an_error() -> None:
    precision = pytest.importorskip("lightning.pytorch.plugins.precision")

    class Detour(precision.Precision):
        def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            tensor.backward()

    module = Classifier()
    before = first_weight(module.network).clone()
    with pytest.raises(RuntimeError, match=r"bypassed LightningModule\.backward"):
        fitted(module, plugins=[Detour()])
    torch.testing.assert_close(first_weight(module.network), before, rtol=0, atol=0)
    assert "backward" not in vars(module)


def test_manual_optimization_is_refused() -> None:
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"call self\.manual_backward\(loss \+ penalty\(loss\)\)"):
        fitted(module)


def test_a_penalty_for_another_network_is_refused() -> None:
    callback = integration.GradL1Callback(gl.GradL1(network(), **SETTINGS))
    with pytest.raises(RuntimeError, match="measures layers outside of this module: 0, "):
        trainer(callback).fit(Classifier(), loader())


def test_two_callbacks_are_refused() -> None:
    module = Classifier()
    penalty = gl.GradL1(module.network, **SETTINGS)
    twice = integration.GradL1Callback(penalty), integration.GradL1Callback(penalty)
    with pytest.raises(RuntimeError, match="the backward of this module was already replaced"):
        trainer(*twice).fit(module, loader())
    assert "backward" not in vars(module)


def test_a_sharded_strategy_is_refused() -> None:
    class Sharded:
        strategy = L.strategies.FSDPStrategy.__new__(L.strategies.FSDPStrategy)

    module = Classifier()
    callback = integration.GradL1Callback(gl.GradL1(module.network, **SETTINGS))
    with pytest.raises(RuntimeError, match="FSDPStrategy is not supported"):
        callback.on_fit_start(Sharded(), module)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: integration.GradL1Callback(None), TypeError, "must be a GradL1, got NoneType"),
        (lambda p: integration.GradL1Callback(p, -1), ValueError, "first_epoch must be 0 or more, got -1"),
        (lambda p: integration.GradL1Callback(p, 1.0), TypeError, "first_epoch must be an int"),
        (
            lambda p: integration.GradL1Callback(gl.GradL1(p.model, 0.1, 0.1, method="finite_difference")),
            ValueError,
            "finite difference calls a closure twice",
        ),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(gl.GradL1(network(), 0.1, 0.1))


def test_without_lightning_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['lightning'] = None; import gradl1_fast.integrations.lightning"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        python("-c", code)
    assert "pip install '.[lightning]'" in failed.value.stderr.splitlines()[-1]
