"""Data sets: checked readers of files that are already there; nothing is downloaded."""

from gradl1_fast.training.data.batches import Batch, shuffled_batches
from gradl1_fast.training.data.digits import Digits, digits

__all__ = ["Batch", "Digits", "digits", "shuffled_batches"]
