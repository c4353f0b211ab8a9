"""``python -m bench.exported``: latency of exported files beside float and onnxruntime's own quantizer.

Each network is exported at 224 x 224; its float file is also quantized by ``onnxruntime.quantization.
quantize_static``. All files of a network run in turn, one image, one thread, in a plain session. With
``--openvino PYTHON``, an interpreter that has OpenVINO runs the same files there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import gradl1_fast as gl
from bench import results
from bench.measure import quantiles
from gradl1_fast.quantization.export import compare, simulate
from gradl1_fast.quantization.export.agreement import Agreement
from gradl1_fast.quantization.export.arguments import Arguments
from gradl1_fast.quantization.export.onnx_file import Exported, write_onnx
from gradl1_fast.quantization.export.onnx_graph import to_onnx
from gradl1_fast.quantization.export.program import trace
from gradl1_fast.quantization.export.speed import integer_layers, run_in_turn
from gradl1_fast.training import models

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(models.resnet18, 64, 1000, "imagenet"),
    "resnet50": partial(models.resnet50, 64, 1000, "imagenet"),
    "mobilenet_v2": partial(models.mobilenet_v2, 32, 1000, "imagenet"),
    "vgg_like": partial(models.vgg_like, 64, 1000),
}
Width = int | None
ALL_WIDTHS: tuple[tuple[Width, Width], ...] = (
    (8, 8),
    (4, 8),
    (6, 6),
    (4, 4),
    (2, 2),
    (8, None),
    (4, None),
    (16, 16),
)
STATIC, FLOAT = "onnxruntime quantize_static", "float"
SIZE = 224


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--widths", nargs="*", default=["resnet18"], help="networks measured at all widths")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter that has OpenVINO")
    parser.add_argument("--out", type=Path, default=results.HERE / "bench" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        widths = ALL_WIDTHS if name in arguments.widths else ALL_WIDTHS[:1]
        for row in measure(name, widths, arguments.repeats, arguments.openvino):
            print(row)
            rows.append(row)
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": _openvino_version(arguments.openvino)}
    folder = arguments.out / results.device_name() / "export"
    results.write(folder, rows, repeats=arguments.repeats, threads=1, batch=1, **versions)
    print(f"written: {folder}")


def measure(
    name: str, widths: tuple[tuple[Width, Width], ...], repeats: int, openvino: str | None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each file of a network and each runtime; the latencies of a runtime are of one run."""
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    files, agreements = _files(name, images, widths)
    times = run_in_turn(files, {"input": images[:1].numpy()}, repeats=repeats, threads=1)
    yield from _rows(name, "onnxruntime", files, times, agreements)
    if openvino:
        answer = _in_openvino(openvino, files, repeats)
        taken = {label: data for label, data in files.items() if label in answer["times"]}
        yield from _rows(name, "openvino", taken, answer["times"], {})
        for label, reason in answer["refused"].items():
            yield _about(name, "openvino", label) | {"unavailable": reason}


def _files(
    name: str, images: Tensor, widths: tuple[tuple[Width, Width], ...]
) -> tuple[dict[str, bytes], dict[str, Agreement]]:
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    with torch.no_grad():
        plain.train()(images)  # statistics of batch norms
    model = gl.convert(plain.eval(), per_channel=True)
    gl.calibrate(model, [images])
    written = dict(_exported(model, images, widths))
    first = next(iter(written.values()))
    files = {FLOAT: first.in_float()}
    files[STATIC] = _quantize_static(files[FLOAT], images)
    files |= {label: file.data for label, file in written.items()}
    return files, {label: _compared(file, images[:2]) for label, file in written.items()}


def _compared(file: Exported, images: Tensor) -> Agreement:
    """Return how far codes and outputs are from the simulation; no time counts where that is too far."""
    found = compare(file, images)
    faults = dataclasses.replace(found, top_1=1.0).faults()  # decisions on two images say nothing
    if faults:
        raise RuntimeError("; ".join(faults))
    return found


def _exported(
    model: nn.Module, images: Tensor, widths: tuple[tuple[Width, Width], ...]
) -> Iterator[tuple[str, Exported]]:
    program = template = None
    for w, a in widths:
        prepared = simulate(model, images, w=w, a=a)
        if program is None:
            program = trace(prepared, images, batch=True, sizes=False, joints=True)
            program.find_ranges(Arguments.of(images), program.grids(prepared))
            template = to_onnx(program)
        yield f"gradl1_fast ({w or FLOAT}, {a or FLOAT})", write_onnx(prepared, program, template)


class _Reader(CalibrationDataReader):
    def __init__(self, images: Tensor) -> None:
        self.images = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next image."""
        image = next(self.images, None)
        return None if image is None else {"input": image.numpy()}


def _quantize_static(data: bytes, images: Tensor) -> bytes:
    """Return the file of onnxruntime's own recipe: pre-processing, uint8 and int8, per channel."""
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, made = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "made"))
        plain.write_bytes(data)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            made,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return made.read_bytes()


def _rows(
    name: str,
    runtime: str,
    files: Mapping[str, bytes],
    times: Mapping[str, list[float]],
    agreements: Mapping[str, Agreement],
) -> Iterator[dict[str, Any]]:
    medians = {label: quantiles(values)[1] for label, values in times.items()}
    for label, data in files.items():
        low, median, high = (1e3 * value for value in quantiles(times[label]))
        row = _about(name, runtime, label) | {
            "median_ms": round(median, 3),
            "p20_ms": round(low, 3),
            "p80_ms": round(high, 3),
            "ratio_to_float": round(medians[label] / medians[FLOAT], 3),
            "ratio_to_static": round(medians[label] / medians[STATIC], 3),
            "bytes": len(data),
        }
        if runtime == "onnxruntime":
            row["integer_layers"], row["layers"] = integer_layers(data)
        if label in agreements:
            found = agreements[label]
            row |= {"largest_code_difference": found.codes, "output_error": found.outputs}
        yield row


def _about(name: str, runtime: str, label: str) -> dict[str, Any]:
    size = f"{SIZE} x {SIZE}, batch 1, 1 thread"
    keys = {"family": "export", "operation": name, "sweep": runtime, "provider": label, "size": size}
    return {**keys, "dtype": "float32", "layout": "NCHW", "device": "cpu"}


def _in_openvino(python: str, files: Mapping[str, bytes], repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        paths = {label: Path(folder) / f"{i}.onnx" for i, label in enumerate(files)}
        for label, path in paths.items():
            path.write_bytes(files[label])
        request = {
            "paths": {label: str(path) for label, path in paths.items()},
            "repeats": repeats,
            "size": SIZE,
        }
        worker = Path(__file__).with_name("openvino_worker.py")
        done = subprocess.run(
            [python, worker], input=json.dumps(request), capture_output=True, text=True, check=True
        )
    return dict(json.loads(done.stdout))


def _openvino_version(python: str | None) -> str:
    if python is None:
        return "not measured"
    code = "import openvino; print(openvino.__version__)"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
