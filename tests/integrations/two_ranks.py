"""Trains on two ranks and writes the weights: `python -m tests.integrations.two_ranks FILE`.

A process of its own, since it forks, which one with threads (pytest-xdist's) should not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from tests.integrations.test_lightning import Classifier, fitted


class Share(Classifier):
    """Each rank takes every second image of a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([part[self.global_rank :: 2] for part in batch], batch_idx)


if __name__ == "__main__":
    module = fitted(Share(), strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    torch.save(module.network.state_dict(), sys.argv[1])
