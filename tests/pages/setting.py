"""The names that code blocks of pages assume: a trained model, its data, and functions."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import gradl1_fast as gl

__all__ = ["names"]


def build() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def right_and_count(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[float, int]:
    return float((model(batch[0]).argmax(1) == batch[1]).sum()), len(batch[0])


@torch.no_grad()
def minus_loss(model: nn.Module) -> float:
    return -float(F.cross_entropy(model(images), labels))


def fit(model: nn.Module, penalty: gl.GradL1 | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        (loss if penalty is None else loss + penalty(loss)).backward()
        optimizer.step()
        optimizer.zero_grad()


images = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(3))
labels = torch.arange(16) % 3
loader = DataLoader(TensorDataset(images, labels), batch_size=4)


def names() -> dict[str, Any]:
    """Return a fresh setting: names as a block of a page may use them."""
    torch.manual_seed(0)
    model = build()
    return {
        "__name__": "page",
        "gl": gl, "torch": torch, "F": F, "nn": nn, "copy": copy,
        "build": build, "evaluate": evaluate, "fit": fit, "right_and_count": right_and_count,
        "minus_loss": minus_loss, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loader": loader, "batches": list(images.split(4)), "images": images, "x": images, "y": labels,
        "widths": [(8, 8), (4, 4)], "fully_shard": fully_shard, "blocks": (),
        "quiet": {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False,
        },
    }  # fmt: skip
