"""The comparison of training methods: by every method a network, quantized to every width."""

from gradl1_fast.training.experiment.experiment import EXPERIMENTS, Experiment, named, run
from gradl1_fast.training.experiment.methods import METHODS, Method
from gradl1_fast.training.experiment.results import ResultError, Results, Row, Run

__all__ = [
    "EXPERIMENTS",
    "METHODS",
    "Experiment",
    "Method",
    "ResultError",
    "Results",
    "Row",
    "Run",
    "named",
    "run",
]
