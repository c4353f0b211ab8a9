"""MatQuant: slices of codes."""

from __future__ import annotations

import pytest
import torch

from gradl1_fast.training.methods.matquant import SlicedCodes, sliced
from tests.gradients import assert_gradient

CODES = torch.arange(256.0)
W = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_slice_is_the_nearest_multiple_of_a_cell(bits):
    found, cell = sliced(CODES, bits), 2 ** (8 - bits)
    assert set((found / cell).tolist()) == set(map(float, range(2**bits)))
    inside = cell * (2**bits - 1) >= CODES
    assert ((found - CODES).abs()[inside] <= cell / 2).all()
    assert (found[~inside] == cell * (2**bits - 1)).all()


def test_eight_bits_are_all_of_the_code():
    assert torch.equal(sliced(CODES, 8), CODES)


def test_rounded_slices_do_not_nest():
    """That is why they are no bit planes: 3-bit codes differ from the first bits of the 8-bit ones."""
    assert int((sliced(CODES, 3) != CODES - CODES % 32).sum()) > 100


def test_the_ends_of_the_weight_are_codes_at_eight_bits():
    found = SlicedCodes().quantize(W, 8)
    assert float((found - W).abs().max()) <= float(W.max() - W.min()) / 255 / 2 * (1 + 1e-9)
    assert float(found.min()) == pytest.approx(float(W.min()))


def test_the_gradient_passes():
    w, g = W.clone().requires_grad_(), torch.randn_like(W)
    assert_gradient(*torch.autograd.grad((SlicedCodes().quantize(w, 2) * g).sum(), w), g, 1e-12)
