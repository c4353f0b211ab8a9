"""Vertical layering: the codes nest, and the planes are those of an any-bit file, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradl1_fast as gl
from gradl1_fast.quantization import bit_planes
from gradl1_fast.training.methods import make
from gradl1_fast.training.methods.several_widths import WidthStatistics, widths_in
from gradl1_fast.training.methods.vertical_layering import NestedCodes
from tests.gradients import assert_gradient
from tests.training.methods import small

W = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def grid(clip=None, weight=W):
    made = NestedCodes(weight)
    if clip is not None:
        made.clip.data.fill_(clip)
    return made


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_within_the_range_moves_by_half_a_scale_at_most(bits):
    made = grid()
    scale = made.scale() * 2 ** (8 - bits)
    assert ((made.quantize(W, bits) - W).abs() <= scale / 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_is_the_first_bits_of_the_wider_one(bits):
    made = grid(clip=0.8 * float(W.abs().max()))

    def code(width):
        """From the middle of a cell back to its place."""
        scale = made.scale().detach() * 2 ** (8 - width)
        shift = 0.5 * (1 - 2.0 ** (width - 8))  # from the middle of a cell to its lower end, in its own scale
        return (made.quantize(W, width).detach() / scale - shift + 2 ** (width - 1)).round().long()

    assert torch.equal(code(bits), code(8) >> (8 - bits))
    assert torch.equal(code(bits), code(bits + 1) >> 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_is_that_of_lsq(bits):
    made = grid(clip=0.6 * float(W.abs().max()))
    w, g = W.clone().requires_grad_(), torch.randn_like(W)
    value = made.quantize(w, bits)
    of_w, of_clip = torch.autograd.grad((value * g).sum(), (w, made.clip))
    scale = made.clip.detach() / 127
    inside = (W / scale).abs() <= 127
    assert_gradient(of_w, torch.where(inside, g, torch.zeros_like(g)), 1e-12)
    slope = value.detach() / scale - torch.where(inside, W / scale, torch.zeros_like(W))
    expected = (g * slope).sum() / 127 * (127 * W.numel()) ** -0.5
    assert_gradient(of_clip, expected, 1e-10)


def test_the_planes_are_those_of_the_any_bit_file(tmp_path):
    """What was trained at each width is what a reader of the file computes with."""
    made = small.advance(small.trainer("vertical"), small.STEPS)
    grids = made.objective.grids
    trained = {}
    for w, _ in made.objective.widths:
        trained[w] = {
            name: each.quantize(layer_weight(made, name), w).detach() for name, each in grids.items()
        }
    assert any(
        float(each.clip) != float(NestedCodes(layer_weight(made, n)).clip) for n, each in grids.items()
    )
    model = made.finish()
    gl.save_any_bit(model, tmp_path / "model.safetensors")
    for w, values in trained.items():
        read = gl.load_any_bit(small.network(), tmp_path / "model.safetensors", w=w)
        for name, value in values.items():
            assert torch.equal(read.get_submodule(name).weight_quantizer(), value), (name, w)


def layer_weight(made, name):
    return made.model.get_submodule(name).parametrizations.weight.original.detach()


def test_planes_come_back_from_their_bytes():
    made = grid(weight=W.float())
    scale = made.scale().detach()
    codes = bit_planes.encode(W.float(), scale)
    planes = [bit_planes.pack(codes, i) for i in range(8)]
    for bits in range(1, 9):
        read = bit_planes.decode(bit_planes.unpack(planes[:bits], W.shape), scale, bits)
        assert torch.equal(read, made.quantize(W.float(), bits).detach())


def test_the_gradient_of_a_step_is_the_sum_over_the_widths():
    """In float64, against each width by itself."""
    x, y = small.IMAGES[0].double(), small.IMAGES[1]
    grads = []
    for widths in ("8 4 2", "8", "4", "2"):
        model = small.network().double()
        method = make("vertical", model, widths=widths, coefficient=0.5)
        method.backward(lambda model=model: nn.functional.cross_entropy(model(x), y))
        grads.append([p.grad.clone() for p in model.parameters()])
    for whole, eight, four, two in zip(*grads, strict=True):
        expected = eight + 0.5 * four + 0.5 * two
        if expected.norm() > 1e-8:
            assert_gradient(whole, expected, 1e-9)


def test_each_width_has_statistics_of_its_own():
    model = nn.Sequential(nn.BatchNorm1d(2))
    statistics, norm = WidthStatistics(model), model[0]
    start = norm.running_mean.clone()
    with statistics.of(4):
        model(torch.full((3, 2), 10.0))
        narrow = norm.running_mean.clone()
    assert torch.equal(norm.running_mean, start)
    with statistics.of(None):
        model(torch.full((3, 2), -10.0))
    own = norm.running_mean.clone()
    assert not torch.equal(own, start)
    other = WidthStatistics(model)
    other.load_state_dict(statistics.state_dict())
    with other.of(4):
        assert torch.equal(norm.running_mean, narrow)
    assert torch.equal(norm.running_mean, own)


def test_a_width_is_trained_and_evaluated_with_its_own_statistics():
    model, (x, y) = small.network(), small.IMAGES
    method = make("vertical", model, widths="8 2")
    method.backward(lambda: nn.functional.cross_entropy(model(x), y))
    own = model[1].running_mean.clone()
    for w, same in ((8, True), (2, False)):
        with method.quantized(w, w):
            assert torch.equal(model[1].running_mean, own) == same
    assert torch.equal(model[1].running_mean, own)


def test_widths_are_read_and_checked():
    assert widths_in("widths", "2 8 4 4") == widths_in("widths", [4, 2, 8]) == [8, 4, 2]
    for wrong in ("", "9", "0 4", "four", []):
        with pytest.raises(ValueError, match="VerticalLayering: widths must be widths from 1 to 8"):
            make("vertical", small.network(), widths=wrong)
