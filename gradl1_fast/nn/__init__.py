"""Modules: layers, quantizers, conversion and its report. No arithmetic lives here."""

from gradl1_fast.nn.act import Act2d
from gradl1_fast.nn.batch_norm_act import BatchNormAct2d
from gradl1_fast.nn.convert import convert
from gradl1_fast.nn.converted import ConvertedModel
from gradl1_fast.nn.layers import QConv1d, QConv2d, QConv3d, QLinear, QuantizedLayer
from gradl1_fast.nn.quantizers import ActivationQuantizer, Observer, WeightQuantizer
from gradl1_fast.nn.report import Report, report

__all__ = [
    "Act2d",
    "ActivationQuantizer",
    "BatchNormAct2d",
    "ConvertedModel",
    "Observer",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QLinear",
    "QuantizedLayer",
    "Report",
    "WeightQuantizer",
    "convert",
    "report",
]
