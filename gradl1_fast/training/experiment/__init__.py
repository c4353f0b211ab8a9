"""The comparison of training methods: by every method a network, quantized in several regimes."""

from gradl1_fast.training.experiment.experiment import EXPERIMENTS, Experiment, named
from gradl1_fast.training.experiment.methods import VARIANTS
from gradl1_fast.training.experiment.regimes import REGIMES, Regime
from gradl1_fast.training.experiment.results import ResultError, Results, Row, Run
from gradl1_fast.training.experiment.running import run

__all__ = [
    "EXPERIMENTS",
    "REGIMES",
    "VARIANTS",
    "Experiment",
    "Regime",
    "ResultError",
    "Results",
    "Row",
    "Run",
    "named",
    "run",
]
