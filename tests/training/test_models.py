"""The networks that demo, tests and benchmarks share."""

import sys

import pytest
import torch

import gradl1_fast as gl
from gradl1_fast.training import models

CASES = {
    "resnet18-cifar": (lambda: models.resnet18(4), (2, 3, 32, 32)),
    "resnet18-imagenet": (lambda: models.resnet18(4, stem="imagenet"), (2, 3, 64, 64)),
    "resnet50-cifar": (lambda: models.resnet50(4), (2, 3, 16, 16)),
    "resnet50-imagenet": (lambda: models.resnet50(4, stem="imagenet"), (2, 3, 64, 64)),
    "vgg": (lambda: models.vgg_like(4), (2, 3, 16, 16)),
    "vgg-28": (lambda: models.vgg_like(4, channels=1), (2, 1, 28, 28)),
    "vgg-small": (lambda: models.vgg_small(4), (2, 1, 28, 28)),
    "vgg-without-batch-norm": (lambda: models.vgg_like(4, batch_norm=False), (2, 3, 16, 16)),
    "mobilenet": (lambda: models.mobilenet_like(4), (2, 3, 32, 32)),
    "mobilenet-v2-cifar": (lambda: models.mobilenet_v2(4), (2, 3, 16, 16)),
    "mobilenet-v2-imagenet": (lambda: models.mobilenet_v2(4, stem="imagenet"), (2, 3, 64, 64)),
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


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872)],
)
def test_they_have_the_size_of_the_originals(name, parameters):
    model = models.build(name, classes=1000, stem="imagenet")
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(("stem", "side"), [("cifar", 4), ("imagenet", 1)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_the_stem_says_how_often_sides_are_halved(name, stem, side):
    sizes = []
    model = models.build(name, width=4, stem=stem).eval()
    pool = next(m for m in model.modules() if isinstance(m, torch.nn.AdaptiveAvgPool2d))
    pool.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [(side, side)]


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="'cifar' or 'imagenet', got 'tiny'"):
        models.resnet18(stem="tiny")


@pytest.mark.parametrize("name", models.NAMES)
def test_every_network_is_built_by_name(name):
    model = models.build(name, classes=7, channels=2, width=4).eval()
    assert model(torch.randn(2, 2, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("lenet", {}, ValueError, "one of digits_net, .*timm:NAME, got 'lenet'"),
        ("vgg_like", {"stem": "cifar"}, ValueError, "stem: the model vgg_like does not take it"),
        ("vgg_like", {"width": 0}, ValueError, "width must be 1 or more"),
        ("vgg_like", {"classes": 2.0}, TypeError, "classes must be an int"),
        ("timm:resnet18", {"width": 3}, ValueError, "width: a model of timm does not take it"),
    ],
)
def test_what_cannot_be_built_is_refused(name, settings, error, message):
    with pytest.raises(error, match=message):
        models.build(name, **settings)


def test_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[timm\]'"):
        models.build("timm:resnet18")


def test_where_timm_cannot_be_imported_says_why(monkeypatch, tmp_path):
    reason = "operator torchvision::nms does not exist"
    (tmp_path / "timm.py").write_text(f"raise RuntimeError({reason!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ImportError, match=f"timm:resnet18 needs timm.*{reason}.*from the same build"):
        models.build("timm:resnet18")
