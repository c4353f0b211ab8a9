"""Operations that PyTorch differentiates only once raise PyTorch's error, see docs/when-not.md."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl

WORDS, LENGTH = 5, 8


def squares(scores: Tensor) -> Tensor:
    return scores.square().mean()


def ctc(scores: Tensor) -> Tensor:
    rows = scores.permute(2, 0, 1).log_softmax(-1)
    targets = torch.tensor([[1, 2], [3, 1]])
    return F.ctc_loss(rows, targets, (LENGTH, LENGTH), (2, 2))


def network() -> nn.Module:
    torch.manual_seed(0)
    return gl.convert(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Sigmoid(), nn.Conv1d(4, WORDS, 1)))


def test_an_error_names_the_operation() -> None:
    model = network()
    penalty = gl.GradL1(model, lambda_w=0.1, lambda_a=0.1)
    loss = ctc(model(torch.randn(2, 3, LENGTH)))
    with pytest.raises(RuntimeError, match="ctc_loss_backward"):
        (loss + penalty(loss)).backward()


def test_what_can_be_differentiated_twice_raises_nothing() -> None:
    model = network()
    penalty = gl.GradL1(model, lambda_w=0.1, lambda_a=0.1)
    loss = squares(model(torch.randn(2, 3, LENGTH)))
    (loss + penalty(loss)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
