"""Training with gradient-l1 regularisation, and quantization of one set of weights on demand.

Source: Alizadeh et al., "Gradient l1 Regularization for Quantization Robustness", ICLR 2020,
arXiv 2002.07520.
"""

from gradl1_fast import functional, nn
from gradl1_fast._version import __version__ as __version__
from gradl1_fast.backends import UnavailableError, backend
from gradl1_fast.conversion import convert, report
from gradl1_fast.nn import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QEmbedding,
    QLinear,
)
from gradl1_fast.penalty import GradL1
from gradl1_fast.quantization import (
    Costs,
    Equalization,
    Folding,
    Plan,
    Sensitivity,
    Table,
    bits,
    calibrate,
    calibrate_weights,
    correct_bias,
    costs,
    equalize,
    fold_batch_norm,
    load_any_bit,
    load_ranges,
    ranges,
    save_any_bit,
    save_ranges,
    search,
    sensitivity,
    set_bits,
    sweep,
    track_ranges,
)

__all__ = [
    "Costs",
    "Equalization",
    "Folding",
    "GradL1",
    "Plan",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QLinear",
    "Sensitivity",
    "Table",
    "UnavailableError",
    "backend",
    "bits",
    "calibrate",
    "calibrate_weights",
    "convert",
    "correct_bias",
    "costs",
    "equalize",
    "fold_batch_norm",
    "functional",
    "load_any_bit",
    "load_ranges",
    "nn",
    "ranges",
    "report",
    "save_any_bit",
    "save_ranges",
    "search",
    "sensitivity",
    "set_bits",
    "sweep",
    "track_ranges",
]
