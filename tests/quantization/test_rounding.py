"""Rounding methods compared with independent results, and the use of their codes."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.foreign import product_in
from gradl1_fast.quantization.rounding.base import Problem
from gradl1_fast.quantization.rounding.second_moments import SecondMoments
from tests.networks import VGG

GPTQ, AdaRound = gl.rounding.GPTQ, gl.rounding.AdaRound


def problem(bits: int, *, groups: int = 1, rows: int = 3, columns: int = 7, seed: int = 0) -> Problem:
    """Return a problem with correlated inputs, one of which is always zero."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance, dtype=torch.float64)

    x = normal(groups, columns, columns) @ normal(groups, columns, 4 * columns)
    x[:, columns // 2] = 0
    weight = normal(groups, rows, columns)
    limit = max(2 ** (bits - 1) - 1, 1)
    scale = weight.abs().amax(-1, keepdim=True) / limit
    return Problem(weight, x @ x.mT / x.shape[-1], scale, -limit, limit if bits > 1 else 0)


def textbook(p: Problem, group: int, damping: float, order: Tensor) -> Tensor:
    """Return what GPTQ gives by its definition: after each column, the rest is solved for anew."""
    h, weight = p.moments[group].clone(), p.weight[group].clone()
    dead = h.diagonal() == 0
    h += torch.diag(damping * h.diagonal().mean() + dead)
    codes = torch.empty_like(weight)
    left = order.tolist()
    while left:
        i, left = left[0], left[1:]
        codes[:, i] = (weight[:, i] / p.scale[group, :, 0]).round().clamp(p.q_min, p.q_max)
        error = weight[:, i] - codes[:, i] * p.scale[group, :, 0]
        if left:  # min over d of the output's error with column i off by -error: H_ll d = H_li error
            weight[:, left] += torch.linalg.solve(h[left][:, left], h[left, i])[None] * error[:, None]
    return codes


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_gptq_follows_its_definition(block: int, order: bool) -> None:
    p = problem(3, groups=2)
    codes = GPTQ(block=block, order=order)._in_order(p, GPTQ(order=order)._order(p.moments))
    for group in range(2):
        diagonal = p.moments[group].diagonal()
        places = diagonal.argsort(descending=True, stable=True) if order else torch.arange(7)
        assert torch.equal(codes[group], textbook(p, group, 0.01, places))
    assert not torch.equal(codes, p.nearest(p.weight))


METHODS: dict[str, gl.rounding.RoundingMethod] = {"gptq": GPTQ(), "adaround": AdaRound(steps=100)}


@pytest.mark.parametrize("name", METHODS)
def test_no_row_has_a_larger_error_than_with_nearest_codes(name: str) -> None:
    gained = 0.0
    for bits in (1, 2, 3, 8, 16):
        for seed in range(2 if bits < 8 else 1):
            p = problem(bits, groups=1 + seed, seed=seed)
            codes, nearest = METHODS[name].codes(p), p.nearest(p.weight)
            d, before = p.weight - codes * p.scale, p.weight - nearest * p.scale
            errors = torch.diagonal(d @ p.moments @ d.mT, dim1=-2, dim2=-1)
            others = torch.diagonal(before @ p.moments @ before.mT, dim1=-2, dim2=-1)
            assert bool((errors <= others).all())
            assert torch.equal(codes, codes.round().clamp(p.q_min, p.q_max))
            gained += float((others > 1.05 * errors).double().mean()) / 8
    assert gained > 0.3


@pytest.mark.parametrize("name", METHODS)
def test_independent_inputs_give_nearest_codes(name: str) -> None:
    p = problem(4, rows=5, columns=12)
    alone = Problem(p.weight, torch.eye(12, dtype=torch.float64)[None], p.scale, p.q_min, p.q_max)
    assert torch.equal(METHODS[name].codes(alone), p.nearest(p.weight))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 8, 7)),
    "same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same"), (2, 3, 6, 7)),
    "valid, without a batch": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 6, 7)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 5, 4, 6)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_moments_determine_the_error_of_the_output(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradl1_fast.quantization.rounding.second_moments._LARGEST", 300)  # in several parts
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer = gl.convert(make().double())
    x = torch.randn(shape, dtype=torch.float64)
    moments = SecondMoments()
    moments.update(product_in(layer, (x,), {}))
    d = torch.randn_like(layer.weight)
    rows = d.reshape(getattr(layer, "groups", 1), -1, d[0].numel())
    told = ((rows @ moments.mean()) * rows).sum() * moments.count
    with torch.no_grad():
        y = layer(x)
        layer.weight += d
        torch.testing.assert_close(told, (layer(x) - y).square().sum())


DTYPE = torch.float32
X = VGG.batch(DTYPE)[0]


@functools.cache
def template(per_channel: bool, w: int | None) -> nn.Module:
    """Return a network with stored ranges of weights, convolutions in an order of memory of their own."""
    model: Any = gl.convert(VGG.make(DTYPE).eval(), per_channel=per_channel)
    model.to(memory_format=torch.channels_last)
    gl.calibrate(model, [X], ranges="mse")
    gl.calibrate_weights(model, ranges="mse")
    if w is not None:
        gl.round_weights(model, [X], w=w)
    return model


def calibrated(per_channel: bool = True) -> nn.Module:
    """Return a network that is rounded to nearest."""
    return copy.deepcopy(template(per_channel, None))


def rounded(w: int = 3, *, per_channel: bool = True) -> nn.Module:
    """Return a network with codes at one width."""
    return copy.deepcopy(template(per_channel, w))


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if isinstance(m, gl.nn.QuantizedLayer)}


def by_hand(model: nn.Module, w: int) -> nn.Module:
    """Return a model whose float weights are the values of the codes."""
    plain = copy.deepcopy(model)
    for name, layer in layers(model).items():
        quantizer = layer.weight_quantizer
        scale = quantizer.grid(layer.weight.detach(), w)[0]
        shape = [-1, *[1] * (layer.weight.dim() - 1)] if quantizer.axis == 0 else []
        value = quantizer.rounded[w].float() * scale.reshape(shape)
        plain.get_submodule(name).weight = nn.Parameter(value)
    gl.clear_rounding(plain)
    return plain


def output(model: nn.Module, w: int | None, a: int | None = 4) -> Tensor:
    with gl.bits(model, w=w, a=a), torch.no_grad():
        return model(X)


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model gives at the width of its codes, and at others."""
    return {str(w): output(model, w) for w in (3, 4, None)}


def statistics(model: nn.Module) -> list[Tensor]:
    return [b for name, b in model.named_buffers() if "running" in name or "tracked" in name]


@pytest.mark.filterwarnings("ignore:the weights of .* have changed")  # those of the model made by hand
@pytest.mark.parametrize("method", [GPTQ(inputs="float"), AdaRound(steps=20)], ids=["gptq", "adaround"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_model_computes_with_the_codes(per_channel: bool, method: gl.rounding.RoundingMethod) -> None:
    model = calibrated(per_channel)
    nearest, buffers = outputs(model), [b.clone() for b in statistics(model)]
    report = gl.round_weights(model, [X], w=3, a=4, method=method)
    assert [row.name for row in report.rows] == list(layers(model))
    assert all(row.chosen <= row.nearest for row in report.rows)
    assert sum(row.chosen < row.nearest for row in report.rows) > 2
    assert str(report).splitlines()[1].split()[:2] == ["0", "3"]
    now = outputs(model)
    with gl.bits(by_hand(model, 3), w=None, a=4) as plain, torch.no_grad():
        torch.testing.assert_close(now["3"], plain(X))
    assert all(torch.equal(b, now_b) for b, now_b in zip(buffers, statistics(model), strict=True))
    assert not torch.allclose(now["3"], nearest["3"])
    assert all(torch.equal(now[w], nearest[w]) for w in ("4", "None"))
    assert "rounded=[3]" in repr(layers(model)["0"].weight_quantizer)
    gl.clear_rounding(model)
    assert torch.equal(outputs(model)["3"], nearest["3"])


@pytest.mark.parametrize("inputs", ["rounded", "renormalised"])
def test_a_layer_compensates_for_errors_of_earlier_layers(inputs: str) -> None:
    distances = {}
    for where in ("float", inputs):
        model = calibrated()
        gl.round_weights(model, [X], w=3, a=4, method=GPTQ(inputs=where))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        with gl.bits(model, w=None, a=None), torch.no_grad():
            exact = model(X)
        for norm in norms if inputs == "renormalised" else ():
            norm.training, norm.track_running_stats = True, False
        with gl.bits(model, w=3, a=4), torch.no_grad():
            distances[where] = float((model(X) - exact).norm())
    assert distances[inputs] < 0.8 * distances["float"]


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "converted twice": lambda model, _: gl.convert(nn.Sequential(model)),
    "double and back": lambda model, _: copy.deepcopy(model).double().float(),
    "file": lambda model, path: through_file(model, path),
}


def through_file(model: nn.Module, path: Path) -> nn.Module:
    pytest.importorskip("safetensors", reason="files of ranges are safetensors")
    gl.save_ranges(model, path / "r")
    other = rounded(2)  # codes that are not in the file go
    gl.load_ranges(other, path / "r")
    assert list(layers(other)["0"].weight_quantizer.rounded) == [3]
    return other


@pytest.mark.parametrize("case", COPIES)
def test_copies_and_files_keep_the_codes(case: str, tmp_path: Path) -> None:
    model = rounded()
    expected = outputs(model)
    now = outputs(COPIES[case](model, tmp_path))
    assert all(torch.equal(now[w], expected[w]) for w in expected)
    assert not torch.allclose(expected["3"], outputs(calibrated())["3"])


def test_every_use_of_the_model_applies_the_codes() -> None:
    model = rounded()
    expected = output(model, 3)
    table = gl.sweep(model, lambda m: float(m(X).detach().sum()), [(3, 4), (3, 4), (4, 4)], workers=2)
    assert table[3, 4] == pytest.approx(float(expected.sum()), abs=1e-6)


def test_compiled_code_checks_that_the_codes_belong_to_the_weight() -> None:
    torch.manual_seed(0)
    model = gl.convert(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), per_channel=True)
    x = torch.randn(32, 8) @ torch.randn(8, 8)
    gl.calibrate_weights(model, ranges="mse")
    with gl.bits(model, w=3, a=None), torch.no_grad():
        nearest = model(x)
        gl.round_weights(model, [x], w=3)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.allclose(compiled(x), nearest)
        layers(model)["2"].weight.mul_(1.01)
        with pytest.raises(RuntimeError, match="the weight of 2, or its stored range, has changed since"):
            compiled(x)


def test_the_penalty_applies_to_the_weights_in_use() -> None:
    model = gl.convert(VGG.make().train(), per_channel=True)
    x, y = VGG.batch()
    gl.round_weights(model, [x], w=3)
    gradients = []
    for candidate, w in ((model, 3), (by_hand(model, 3), None)):
        penalty = gl.GradL1(candidate, 0.1, 0.1, scale="none")
        with gl.bits(candidate, w=w, a=None):
            loss = nn.functional.cross_entropy(candidate(x), y)
        (loss + penalty(loss)).backward()
        gradients.append([p.grad for p in candidate.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)
    ranged = rounded()
    penalty = gl.GradL1(ranged, 0.1, 0)
    with gl.bits(ranged, w=3, a=None):
        loss = VGG.loss(ranged, DTYPE)
    with pytest.raises(RuntimeError, match="quantized in a stored range"):
        penalty(loss)


def train(model: nn.Module) -> None:
    VGG.loss(model, DTYPE).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def through_data(model: nn.Module) -> None:
    layers(model)["3"].weight.data.add_(0.01)


def one_value(model: nn.Module) -> None:
    with torch.no_grad():
        layers(model)["3"].weight[1, 2, 0, 1] += 1e-3


def swapped(model: nn.Module) -> None:
    layer = layers(model)["3"]
    layer.weight = nn.Parameter(layer.weight.detach().flip(2))


STALE: dict[str, Callable[[nn.Module], object]] = {
    "training": train,
    "through .data": through_data,
    "one value": one_value,
    "the same values in other places": swapped,
    "other weights": lambda m: m.load_state_dict({k: 1.1 * t for k, t in m.state_dict().items()}),
    "another range": lambda m: gl.calibrate_weights(m, ranges="percentile"),
    "no range": lambda m: gl.calibrate_weights(m, ranges="min_max"),
}


@pytest.mark.parametrize("case", STALE)
@pytest.mark.parametrize("copied", [False, True])
def test_codes_of_another_weight_or_range_are_refused(copied: bool, case: str) -> None:
    model = rounded()
    output(model, 3)
    model = copy.deepcopy(model) if copied else model
    STALE[case](model)
    with pytest.raises(
        RuntimeError, match=r"the weight of \d+, or .* rounded at 3 bits: call .*clear_rounding"
    ):
        output(model, 3, None)
    output(model, 4, None)
    gl.clear_rounding(model, w=4)
    assert layers(model)["0"].weight_quantizer.rounded
    gl.clear_rounding(model, w=3)
    output(model, 3, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_a_narrower_type_does_not_count_as_a_change(dtype: torch.dtype) -> None:
    model = copy.deepcopy(rounded()).to(dtype)
    layer = layers(model)["3"]
    layer.weight_quantizer.bits = 3
    quantized = layer.weight_quantizer(layer.weight)
    scale = layer.weight_quantizer.grid(layer.weight, 3)[0].reshape(-1, 1, 1, 1)
    assert torch.equal(quantized, (layer.weight_quantizer.rounded[3] * scale).to(dtype))


def test_folding_keeps_per_channel_codes_and_reports_dropped_ones() -> None:
    model: Any = rounded()
    with torch.no_grad():
        model[1].weight[::2] *= -1
    folding = gl.fold_batch_norm(model)
    assert not folding.without_rounding
    expected = output(model, 3, None)
    torch.testing.assert_close(output(folding.model, 3, None), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output(gl.fold_batch_norm(calibrated()).model, 3, None), expected, rtol=1e-2)
    of_tensors = gl.convert(VGG.make(DTYPE).eval())
    gl.round_weights(of_tensors, [X], w=3)
    dropped = gl.fold_batch_norm(of_tensors)
    assert dropped.without_rounding == ["0", "3", "7"]
    assert "0 rounded to nearest again" in " ".join(str(dropped).split())
    assert layers(dropped.model)["12"].weight_quantizer.rounded
    output(dropped.model, 3, None)
    flat = gl.fold_batch_norm(model).model
    gl.round_weights(flat, [X], w=3)
    equalized = gl.equalize(flat)
    assert set(equalized.without_rounding) == {name for pair in equalized.pairs for name in pair}
    output(equalized.model, 3, None)


class Kinds(nn.Module):
    """Layers with one weight, of other kinds, and of none that can be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.again = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
        self.up, self.spare = nn.ConvTranspose1d(4, 3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.relu(self.first(self.words(x))) + 1)
        return self.up(self.normed(torch.relu(x)).mT)


def test_layers_of_every_kind() -> None:
    torch.manual_seed(0)
    model: Any = gl.convert(Kinds().eval())
    ids = torch.randint(9, (7, 5))
    report = gl.round_weights(model, iter([ids, ids[:2]]), w=3, method=GPTQ())
    assert [row.name for row in report.rows] == ["first", "normed"]
    assert report["normed"].chosen <= report["normed"].nearest
    assert report.nearest == {
        "words": "an embedding has no inputs to weigh errors with",
        "up": "a transposed convolution",
        "spare": "no value reached it",
    }
    codes = [m.weight_quantizer.rounded.get(3) for m in (model.first, model.again)]
    assert torch.equal(*codes)
    with gl.bits(model, w=3, a=None):
        model(ids)
        with torch.no_grad():
            model.normed.parametrizations.weight.original1[0, 0] += 1e-4
        with pytest.raises(RuntimeError, match="the weight of normed"):
            model(ids)


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.randn(inside, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def test_a_transposed_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    torch.manual_seed(0)
    model: Any = gl.convert(nn.Sequential(Conv1D(3, 8)), per_channel=True)
    x = torch.randn(9, 8) @ torch.randn(8, 8)
    twin: Any = gl.convert(nn.Sequential(nn.Linear(8, 3)), per_channel=True)
    with torch.no_grad():
        twin[0].weight.copy_(model[0].weight.t())
    for each in (model, twin):
        gl.round_weights(each, [x], w=3)
    assert torch.equal(model[0].weight_quantizer.rounded[3].t(), twin[0].weight_quantizer.rounded[3])


def test_bad_arguments_and_data_leave_the_codes(tmp_path: Path) -> None:
    model = rounded()
    before = outputs(model)
    bad = X.clone()
    bad[0, 0, 0, 0] = torch.nan
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"w": 3, "batches": [bad]}, ValueError, "the input or the weight of '0' holds NaN"),
        ({"w": 3, "batches": []}, ValueError, "round_weights: got no batches"),
        ({"w": 3, "batches": X}, TypeError, "batches is a tensor"),
        ({"w": 3, "method": "best"}, ValueError, "method must be one of 'gptq', 'adaround', got 'best'"),
        ({"w": 3, "method": 3}, TypeError, "a name or an object of gradl1_fast.rounding"),
        ({"w": {"x": 3}}, ValueError, "unknown name 'x'"),
    )
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            gl.round_weights(model, **{"batches": [X], **arguments})
    now = outputs(model)
    assert all(torch.equal(now[w], before[w]) for w in before)
    with pytest.raises(ValueError, match="GPTQ: damping must be more than 0"):
        GPTQ(damping=0)
    with pytest.raises(
        ValueError, match="AdaRound: inputs must be one of 'renormalised', 'rounded', 'float'"
    ):
        AdaRound(inputs="quantized")
    with pytest.raises(ValueError, match="round_weights: the model is not converted"):
        gl.round_weights(VGG.make(), [X], w=3)


def test_save_any_bit_warns_that_codes_are_not_saved(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="any-bit files are safetensors")
    model = rounded()
    with pytest.warns(UserWarning, match="save_any_bit: .* gradl1_fast.round_weights are not saved"):
        gl.save_any_bit(model, tmp_path / "m")
    gl.clear_rounding(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gl.save_any_bit(model, tmp_path / "m")
