"""Quantization on demand: ranges, widths, batch-norm folding, equalization, sweeps, any-bit files."""

from gradl1_fast.quantization import ranges, rounding
from gradl1_fast.quantization.any_bit import load_any_bit, save_any_bit
from gradl1_fast.quantization.bias_correction import correct_bias
from gradl1_fast.quantization.bits import bits, set_bits
from gradl1_fast.quantization.calibration import calibrate, calibrate_weights
from gradl1_fast.quantization.costs import Costs, costs
from gradl1_fast.quantization.equalization import Equalization, equalize
from gradl1_fast.quantization.folding import Folding, fold_batch_norm
from gradl1_fast.quantization.mixed_precision import Plan, search
from gradl1_fast.quantization.norms_file import load_batch_norms, save_batch_norms
from gradl1_fast.quantization.preparation import Preparation, prepare
from gradl1_fast.quantization.ranges_file import load_ranges, save_ranges
from gradl1_fast.quantization.reestimation import Reestimation, reestimate_batch_norm
from gradl1_fast.quantization.rounding.report import Rounding
from gradl1_fast.quantization.rounding.round import clear_rounding, round_weights
from gradl1_fast.quantization.sensitivity import Sensitivity, sensitivity
from gradl1_fast.quantization.sweep import Table, sweep
from gradl1_fast.quantization.tracking import track_ranges

__all__ = [
    "Costs",
    "Equalization",
    "Folding",
    "Plan",
    "Preparation",
    "Reestimation",
    "Rounding",
    "Sensitivity",
    "Table",
    "bits",
    "calibrate",
    "calibrate_weights",
    "clear_rounding",
    "correct_bias",
    "costs",
    "equalize",
    "fold_batch_norm",
    "load_any_bit",
    "load_batch_norms",
    "load_ranges",
    "prepare",
    "ranges",
    "reestimate_batch_norm",
    "round_weights",
    "rounding",
    "save_any_bit",
    "save_batch_norms",
    "save_ranges",
    "search",
    "sensitivity",
    "set_bits",
    "sweep",
    "track_ranges",
]
