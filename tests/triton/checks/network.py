"""A small residual network and one penalised step of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl


class ResNet(nn.Module):
    """Stem, one residual block with a strided shortcut, linear head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width + 1, 3, 2, 1, bias=False), nn.BatchNorm2d(width + 1)
        self.conv2 = nn.Conv2d(width + 1, width + 1, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width + 1)
        self.short, self.bn3 = nn.Conv2d(width, width + 1, 1, 2, bias=False), nn.BatchNorm2d(width + 1)
        self.head = nn.Linear(width + 1, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(y + self.bn3(self.short(x)))
        return self.head(x.mean((2, 3)))


class Training:
    """A converted network with its penalty and one batch; the same for the same arguments."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format,
        bits: int | None = None,
        width: int = 4,
        batch: int = 3,
        scale: str = "step",
    ) -> None:
        torch.manual_seed(0)
        self.model = ResNet(width).to(dtype)
        self.x, self.target = torch.randn(batch, 3, 7, 6, dtype=dtype), torch.arange(batch) % 5
        self.model = gl.convert(self.model).to(device, memory_format=layout)
        self.x, self.target = self.x.to(device, memory_format=layout), self.target.to(device)
        if bits is not None:
            gl.calibrate(self.model, [self.x])
            gl.set_bits(self.model, w=bits, a=bits)
        self.penalty = gl.GradL1(self.model, lambda_w=0.01, lambda_a=0.02, scale=scale)

    def step(self) -> Tensor:
        """Leave the gradients of loss and penalty in the parameters; return their sum."""
        loss = F.cross_entropy(self.model(self.x), self.target)
        total = loss + self.penalty(loss)
        total.backward()
        return total

    def results(self) -> list[Tensor]:
        total = self.step().detach()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [total, *self.penalty.terms.values(), *grads, *self.model.buffers()]
