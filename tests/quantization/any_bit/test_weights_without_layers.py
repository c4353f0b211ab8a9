"""Weights of an any-bit file that a model reads or changes without calling their layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.quantization.export import FORMATS
from tests.quantization.export.models import OfDict, calibrated, inputs

pytest.importorskip("safetensors", reason="any-bit files need safetensors")

READS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "product": lambda m, x: nn.functional.linear(x, m.qkv.weight),
    "untraceable": lambda m, x: x @ m.qkv.weight.t() if float(x.sum()) < 1e9 else x,
    "table": lambda m, x: x + m.queries.weight.unsqueeze(0).repeat(len(x), 1, 1).mean(1),
    "forgiving": lambda m, x: x + m.queries.weight.mean(0).nan_to_num().clamp(-1, 1),
    "data": lambda m, x: x * m.qkv.weight.data.sum() + m.qkv.weight.detach().numpy().sum(),
    "shape": lambda m, x: x.to(m.qkv.weight.dtype).to(m.qkv.weight.device) * m.qkv.weight.shape[0],
}


class Reading(nn.Module):
    def __init__(self, read: str) -> None:
        super().__init__()
        self.read = read
        self.qkv, self.out, self.queries = nn.Linear(6, 6), nn.Linear(6, 3), nn.Embedding(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(READS[self.read](self, x)) + self.qkv(x).mean()


def loaded(make: Callable[[], nn.Module], folder: Path, **options: int) -> nn.Module:
    torch.manual_seed(0)
    gl.save_any_bit(gl.convert(make().eval()), folder / "file")
    return gl.load_any_bit(gl.convert(make().eval()), folder / "file", **options)


def with_weights_of(model: nn.Module) -> Reading:
    """Return the float model whose weights are what a model from a file has at its present width."""
    plain = Reading(model.read).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    for name in ("qkv", "out", "queries"):
        plain.get_submodule(name).weight.data = model.get_submodule(name).weight_quantizer()
    return plain


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("read", READS)
def test_they_have_the_values_of_the_width(read: str, mode: Callable[[], None], tmp_path: Path) -> None:
    model, x = loaded(lambda: Reading(read), tmp_path), torch.randn(5, 6)
    for w in (8, 3, None):
        gl.set_bits(model, w=w, a=None)
        with mode():
            assert torch.equal(model(x), with_weights_of(model)(x))
    assert not model.qkv.weight.requires_grad
    again = gl.load_any_bit(model, tmp_path / "file", w=4)
    assert torch.equal(again(x), with_weights_of(again)(x))


@pytest.mark.parametrize("read", ["product", "table", "shape"])
def test_they_have_the_values_of_the_width_in_a_compiled_model(read: str, tmp_path: Path) -> None:
    model, x = loaded(lambda: Reading(read), tmp_path), torch.randn(5, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=read == "shape")
    for w in (8, 3):
        gl.set_bits(model, w=w, a=None)
        assert torch.equal(compiled(x), with_weights_of(model)(x))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def with_a_new_layer(model: nn.Module) -> nn.Module:
    model.extra = nn.Linear(2, 2)
    return gl.convert(model)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, with_a_new_layer],
    ids=["deepcopy", "pickle", "torch.save", "second conversion"],
)
def test_copies_have_their_own_widths(copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model, x = loaded(lambda: Reading("product"), tmp_path), torch.randn(5, 6)
    twin, before = copied(model), model(x)
    assert torch.equal(twin(x), before)
    gl.set_bits(twin, w=2, a=None)
    assert torch.equal(twin(x), with_weights_of(twin)(x))
    assert torch.equal(model(x), before)
    assert twin.half().qkv.weight.dtype == twin.qkv.weight.sum().dtype == torch.float16
    assert model.qkv.weight.dtype == torch.float32


WRITES: dict[str, Callable[[Tensor], object]] = {
    "div_": lambda w: w.div_(2),
    "add_": lambda w: w.__iadd__(1),
    "mul_": lambda w: w.data.mul_(2),
    "copy_": lambda w: w.t().copy_(w),
    "zero_": lambda w: w.view(-1).chunk(3)[0].zero_(),
    "fill_": lambda w: w.detach().fill_(0),
    "sub_": lambda w: w[0].sub_(1),
    "__setitem__": lambda w: w.__setitem__(0, 1.0),
    "add": lambda w: torch.add(w, 1, out=w),
    "normal_": lambda w: nn.init.normal_(w),
    "__set__": lambda w: setattr(w, "data", torch.zeros(6, 6)),
}


class Writing(nn.Module):
    """Changes its weight in evaluation, as RWKV of transformers does."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write, self.done = write, False
        self.proj = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                WRITES[self.write](self.proj.weight)
            self.done = True
        return self.proj(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_code_that_changes_them_is_refused_by_name(
    write: str, mode: Callable[[], None], tmp_path: Path
) -> None:
    model = loaded(lambda: Writing(write), tmp_path, w=4)
    for _ in range(2):
        with (
            mode(),
            pytest.raises(RuntimeError, match=f"the weight of 'proj' .* read-only, but {write} changes it"),
        ):
            model(torch.randn(2, 6))


def test_the_file_contains_earlier_changes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, saved, fresh = torch.randn(2, 6), *(gl.convert(Writing("div_").eval()) for _ in range(2))
    saved(x), fresh(x)
    gl.save_any_bit(saved, tmp_path / "file")
    gl.load_any_bit(fresh, tmp_path / "file")
    with gl.bits(saved, w=8, a=None):
        assert torch.equal(fresh(x), saved(x))


def test_memory_read_without_pytorch_is_nan(tmp_path: Path) -> None:
    weight = loaded(lambda: Reading("shape"), tmp_path).qkv.weight
    with torch._C.DisableTorchFunctionSubclass():
        assert weight.isnan().all()
    assert {weight: "key"}[weight] == "key"
    assert "tensor(" in repr(weight)


def test_the_export_format_agrees_where_a_weight_is_used_without_its_layer() -> None:
    x = ({"a": inputs(6, 4), "b": inputs(6, 4)},)
    file = FORMATS["any-bit"].write(calibrated(OfDict(), x), x)
    found = FORMATS["any-bit"].compare(file, x)
    assert found.outputs < 1e-6
    assert not found.faults()
