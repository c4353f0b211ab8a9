"""Training on a GPU: a captured step equals the eager one, and low precision trains."""

from __future__ import annotations

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.training.config import Config, Optimizer, Penalty, Training
from gradl1_fast.training.loop.ranks import Ranks
from gradl1_fast.training.loop.trainer import Trainer
from gradl1_fast.training.models import digits_net

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GROUP = Ranks(0, 1, torch.device("cuda"))


def trained(optimizer: str = "sgd", epochs: int = 3, **training: object) -> Trainer:
    """Train plainly for an epoch and with the penalty for the others."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 10
    torch.manual_seed(1)
    model = gl.convert(digits_net(8)).cuda()
    settings = Config(
        optimizer=Optimizer(optimizer, 0.01, weight_decay=1e-3),
        training=Training(epochs, 16, **training),  # type: ignore[arg-type]
        penalty=Penalty("gradl1", epochs - 1, 0, {"lambda_w": 0.01, "lambda_a": 0.01, "scale": "step"}),
    )
    trainer = Trainer(model, data, settings, GROUP)
    while not trainer.done:
        trainer.run_epoch()
        losses = torch.stack(trainer.seen.losses)
        trainer.next_epoch()
    assert losses.isfinite().all()
    return trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_captured_step_equals_the_eager_one(optimizer: str) -> None:
    eager, captured = (trained(optimizer, cuda_graph=graph) for graph in (False, True))
    for key, value in eager.model.state_dict().items():
        other = captured.model.state_dict()[key]
        torch.testing.assert_close(
            other, value, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_a_captured_accumulated_step() -> None:
    eager, captured = (trained(accumulate=2, cuda_graph=graph) for graph in (False, True))
    for value, other in zip(eager.model.parameters(), captured.model.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision(precision: str) -> None:
    trained(precision=precision, epochs=6)


def test_a_captured_step_in_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graph does not go together with precision"):
        trained(precision="float16", cuda_graph=True)
