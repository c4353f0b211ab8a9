"""Measures the run time of a file in onnxruntime, and counts the layers computed in integers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradl1_fast.quantization.export.packages import onnx, onnxruntime

__all__ = ["integer_layers", "latencies", "optimized", "run_in_turn"]

_INTEGER = {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm"}
_FLOAT = {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def latencies(
    files: Mapping[str, bytes], feed: Mapping[str, Any], *, repeats: int = 20, threads: int = 1
) -> dict[str, float]:
    """Return the median run time of each file in seconds; see :func:`run_in_turn`."""
    times = run_in_turn(files, feed, repeats=repeats, threads=threads)
    return {name: statistics.median(values) for name, values in times.items()}


def run_in_turn(
    files: Mapping[str, bytes], feed: Mapping[str, Any], *, repeats: int, threads: int
) -> dict[str, list[float]]:
    """Run files in turns, and return the time of each run in seconds.

    Args:
        files: the contents of files with the same inputs, by name.
        feed: the inputs by name.
        repeats: the number of timed runs of each file, after two warm-up runs.
        threads: the number of threads of each session.
    """
    options = onnxruntime().SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    provider = ["CPUExecutionProvider"]
    sessions = {k: onnxruntime().InferenceSession(d, options, providers=provider) for k, d in files.items()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(repeats + 2):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feed)
            times[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in times.items()}


def integer_layers(data: bytes) -> tuple[int, int]:
    """Return the number of convolutions and products computed in integers, and their total number."""
    kinds = [node.op_type for node in optimized(data).node]
    integer = sum(kind in _INTEGER for kind in kinds)
    return integer, integer + sum(kind in _FLOAT for kind in kinds)


def optimized(data: bytes) -> Any:
    """Return the optimized graph that onnxruntime runs."""
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime().InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return onnx().load(options.optimized_model_filepath).graph
