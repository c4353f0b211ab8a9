"""A network of the package timm, fine-tuned with the penalty and quantized to every width.

    pip install '.[timm,cli]'
    python examples/timm_network.py --json timm.json

The images are scikit-learn's handwritten digits, enlarged to 32 × 32, so that nothing is downloaded, and the
network starts at random weights. With your own images, `timm.create_model(NAME, pretrained=True)` and an
epoch or two of this loop are all that changes. Takes about half a minute on one CPU core. The second table
is after more epochs than the first: it shows what fine-tuning gives, and compares no methods, as
`gradl1 experiment` does.

torchvision, which timm needs, must be of the build of torch that is installed.

The network stays of its class: timm's methods, parameter groups and hooks work on it as before. What stays in
float, such as products of attention, is named by the report that is printed first.
"""

from __future__ import annotations

import argparse
import json

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.training.data import digits, shuffled_batches

SIZE = 32
BATCH = 50
WIDTHS = ((None, None), (8, 8), (6, 6), (4, 8), (4, 4), (3, 3))


def enlarged(images: Tensor) -> Tensor:
    """Return images of ``SIZE`` by ``SIZE``."""
    return F.interpolate(images, SIZE, mode="bilinear")


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, penalty: gl.GradL1 | None, rate: float
) -> None:
    """Train with Adam at a learning rate that falls along a cosine to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(epochs)
    model.train()
    for _ in range(epochs):
        for x, y in shuffled_batches((images, labels), BATCH, generator):
            loss = F.cross_entropy(model(x), y)
            (loss if penalty is None else loss + penalty(loss)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def main() -> None:
    """Train, quantize, print."""
    options = arguments()
    torch.manual_seed(0)
    data = digits()
    images, labels = enlarged(data.train[0]), data.train[1]
    test_images, test_labels = enlarged(data.test[0]), data.test[1]
    model = gl.convert(timm.create_model(options.model, num_classes=10, in_chans=1))
    print(gl.report(model))

    @torch.no_grad()
    def accuracy(network: nn.Module) -> float:
        return 100 * float((network(test_images).argmax(1) == test_labels).float().mean())

    rows = []
    for stage, epochs, coefficient, rate in (
        ("plain", options.epochs, 0.0, 3e-3),
        ("with the penalty", options.penalty_epochs, options.coefficient, 3e-3),
    ):
        penalty = gl.GradL1(model, coefficient, coefficient, scale="step") if coefficient else None
        train(model, images, labels, epochs, penalty, rate)
        gl.calibrate(model.eval(), images[:600].split(100))
        table = gl.sweep(model, accuracy, WIDTHS)
        print(f"\n{stage}, {epochs} epochs: test accuracy in percent\n{table}")
        rows += [{"stage": stage, "w": row.w, "a": row.a, "top1": row.value} for row in table.rows]
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python examples/timm_network.py --model resnet10t --epochs 4",
    )
    parser.add_argument("--model", default="test_resnet", help="a name of timm.list_models()")
    parser.add_argument("--epochs", type=int, default=6, help="without the penalty")
    parser.add_argument("--penalty-epochs", type=int, default=6, help="with it, afterwards")
    parser.add_argument("--coefficient", type=float, default=0.05, help="lambda_w and lambda_a")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
