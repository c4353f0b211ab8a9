"""Data sets: checked readers of files that are already there; nothing is downloaded."""

from gradl1_fast.training.data.batches import Batch, shuffled_batches
from gradl1_fast.training.data.dataset import DataError, Dataset
from gradl1_fast.training.data.digits import digits
from gradl1_fast.training.data.fashion_mnist import fashion_mnist
from gradl1_fast.training.data.load import NAMES, load

__all__ = [
    "NAMES",
    "Batch",
    "DataError",
    "Dataset",
    "digits",
    "fashion_mnist",
    "load",
    "shuffled_batches",
]
