"""Quantization on demand: widths, calibration, sweeps."""

from gradl1_fast.quantization.bits import bits, set_bits
from gradl1_fast.quantization.calibration import MinMax, calibrate
from gradl1_fast.quantization.sweep import Table, sweep

__all__ = ["MinMax", "Table", "bits", "calibrate", "set_bits", "sweep"]
