"""Quantization on demand: widths, calibration, sweeps."""

from gradl1_fast.quantization.bits import bits, set_bits
from gradl1_fast.quantization.calibration import MinMax, calibrate
from gradl1_fast.quantization.ranges_file import load_ranges, save_ranges
from gradl1_fast.quantization.sweep import Table, sweep

__all__ = ["MinMax", "Table", "bits", "calibrate", "load_ranges", "save_ranges", "set_bits", "sweep"]
