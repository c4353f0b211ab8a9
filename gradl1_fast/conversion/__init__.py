"""Conversion of models: replacement of layers, tracing of containers, plans, and the report."""

from gradl1_fast.conversion.convert import convert
from gradl1_fast.conversion.report import Report, report

__all__ = ["Report", "convert", "report"]
