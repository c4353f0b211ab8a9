"""Quantization on demand: ranges, widths, batch-norm folding, sweeps."""

from gradl1_fast.quantization.bits import bits, set_bits
from gradl1_fast.quantization.calibration import MinMax, calibrate
from gradl1_fast.quantization.folding import Folding, fold_batch_norm
from gradl1_fast.quantization.ranges_file import load_ranges, save_ranges
from gradl1_fast.quantization.sweep import Table, sweep

__all__ = [
    "Folding",
    "MinMax",
    "Table",
    "bits",
    "calibrate",
    "fold_batch_norm",
    "load_ranges",
    "save_ranges",
    "set_bits",
    "sweep",
]
