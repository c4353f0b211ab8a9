"""PyTorch's older tracer traces a converted model correctly, in float and quantized."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch

import gradl1_fast as gl
from tests.quantization.export.models import RESIDUAL, network

onnx = pytest.importorskip("onnx", reason="export needs onnx")


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_torch_jit_trace_is_right(bits: Any, grad: bool) -> None:
    model, x = network(RESIDUAL)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad), gl.bits(model, w=bits, a=bits):
        warnings.simplefilter("ignore")
        # PyTorch's own check traces again, and sites share results by then; values are compared here.
        traced = torch.jit.trace(model, x[:4], check_trace=False)
        torch.testing.assert_close(traced(x[4:9]), model(x[4:9]))


def test_the_older_exporter_is_right_in_float_and_refuses_quantized_models_by_name() -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = network(RESIDUAL)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        torch.onnx.export(model, (x,), file, dynamo=False)
        session = runtime.InferenceSession(file.getvalue())
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=0, atol=1e-4)
        with gl.bits(model, w=4, a=4), pytest.raises(Exception, match="gradl1_fast::fake_quantize"):
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
