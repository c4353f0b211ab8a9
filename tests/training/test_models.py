"""The networks that demo, tests and benchmarks share."""

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.training import models

CASES = {
    "resnet18-cifar": (lambda: models.resnet18(4), (2, 3, 32, 32)),
    "resnet18-imagenet": (lambda: models.resnet18(4, stem="imagenet"), (2, 3, 64, 64)),
    "vgg": (lambda: models.vgg_like(4), (2, 3, 16, 16)),
    "vgg-without-batch-norm": (lambda: models.vgg_like(4, batch_norm=False), (2, 3, 16, 16)),
    "mobilenet": (lambda: models.mobilenet_like(4), (2, 3, 32, 32)),
    "digits": (lambda: models.digits_net(4), (2, 1, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_logits_for_each_image(name):
    make, shape = CASES[name]
    assert make()(torch.randn(shape)).shape == (2, 10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("error")
def test_converts_whole_and_computes_the_same(name):
    make, shape = CASES[name]
    model, x = make().eval(), torch.randn(shape)
    torch.testing.assert_close(gl.convert(model)(x), model(x), rtol=1e-5, atol=1e-6)


def test_resnet18_has_the_size_of_the_original():
    model = models.resnet18(64, classes=1000, stem="imagenet")
    assert sum(p.numel() for p in model.parameters()) == 11_689_512


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="'cifar' or 'imagenet', got 'tiny'"):
        models.resnet18(stem="tiny")
