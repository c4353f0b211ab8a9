"""Image classifiers in plain PyTorch; :func:`gradl1_fast.convert` takes each of them."""

from gradl1_fast.training.models.build import NAMES, build
from gradl1_fast.training.models.initialisers import INITIALISERS, initialise
from gradl1_fast.training.models.mobilenet import InvertedResidual, digits_net, mobilenet_like, mobilenet_v2
from gradl1_fast.training.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18, resnet20, resnet50
from gradl1_fast.training.models.vgg import vgg_like, vgg_small

__all__ = [
    "INITIALISERS",
    "NAMES",
    "BasicBlock",
    "Bottleneck",
    "InvertedResidual",
    "ResNet",
    "build",
    "digits_net",
    "initialise",
    "mobilenet_like",
    "mobilenet_v2",
    "resnet18",
    "resnet20",
    "resnet50",
    "vgg_like",
    "vgg_small",
]
