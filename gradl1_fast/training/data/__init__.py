"""Data sets: checked readers of files that are already there; nothing is downloaded."""

from gradl1_fast.training.data.batches import Batch, shuffled_batches
from gradl1_fast.training.data.cifar10 import cifar10
from gradl1_fast.training.data.dataset import DataError, Dataset
from gradl1_fast.training.data.digits import digits
from gradl1_fast.training.data.fashion_mnist import fashion_mnist
from gradl1_fast.training.data.image_folder import image_folder
from gradl1_fast.training.data.load import NAMES, load

__all__ = [
    "NAMES",
    "Batch",
    "DataError",
    "Dataset",
    "cifar10",
    "digits",
    "fashion_mnist",
    "image_folder",
    "load",
    "shuffled_batches",
]
