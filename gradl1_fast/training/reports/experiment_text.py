"""The longer texts of an experiment's report."""

from __future__ import annotations

from typing import Any

__all__ = ["ACCURACY", "ALONE", "CHANGES", "COST", "NORMS", "REGIMES", "WEIGHTS", "procedure"]


def procedure(settings: dict[str, Any]) -> list[str]:
    """Return how the networks were trained and quantized, a paragraph each.

    Args:
        settings: of one run.
    """
    penalty, epochs = settings["penalty"], settings["training"]["epochs"]
    warmup = f"Its strength rises linearly over the first {penalty['warmup_epochs']} of these. "
    return [
        "All networks of one seed share initial weights, the order of the images, their augmentation and "
        f"the first epochs; in the last {penalty['epochs']} of {epochs} epochs each method minimises its "
        f"own objective. {warmup if penalty['warmup_epochs'] else ''}"
        "QAT trains at a single width in these epochs.",
        "There is no further training: weights use symmetric grids of least squared error, and "
        f"activations one affine grid per tensor. Calibration uses the first {settings['calibration']} "
        "training images, without labels. The image has at least 8 bits. All of this also holds for the "
        "QAT networks.",
        f"{_CHOSEN_ON_DIGITS if settings['data']['name'] == 'digits' else _CHOSEN} The settings of other "
        "methods follow their papers, or the first-order relation between the methods, and were not tuned.",
    ]


_CHOSEN = (
    "The settings of the gradient-l1 methods were chosen on the last 5,000 training images, with networks "
    "that had not seen these; no choice used the test images."
)
_CHOSEN_ON_DIGITS = "The settings of the gradient-l1 methods were chosen by looking at this data set."


ACCURACY = (
    "(weight bits, activation bits); mean over the seeds ± standard deviation of the sample. Last column: "
    "computing time of the training, relative to plain training. Rows in grey come from a single seed."
)
REGIMES = "A regime says which data are available when the network is quantized:"
NORMS = (
    "Norms are computed per tensor, in float and in evaluation mode on {probed} training images, and "
    'summed. In the charts with "step", each l1 norm is multiplied by the quantization step of its tensor '
    "at 4 bits: half of it is the largest first-order change of the loss at that width. In a layer before "
    "batch norm, larger weights reduce the norm of the gradient without making the network more robust; "
    "the norm times the step does not have this problem."
)
CHANGES = (
    "All weights are moved at once by the same number of half steps (at 4 bits) of their tensor. First "
    "order: the largest increase predicted by the l1 norm. Along the sign: the loss when each weight "
    "moves along the sign of its gradient. Quantized: the loss when weights are rounded to 8, 7, 6, 5, 4 "
    "and 3 bits, placed at the largest move that rounding can make; losses that decrease are not drawn. "
    "Where the measured line departs from the prediction, curvature dominates."
)
ALONE = (
    "The increase of the loss on {probed} training images when only one tensor is quantized to "
    "{alone_bits} bits. The name of a layer followed by .input is the input of that layer, the first that "
    "receives it; the image has at least 8 bits."
)
WEIGHTS = (
    "Of the first seed. Precision: mean range of a channel over that of the tensor. Error: mean squared "
    "error at 8 bits with one range."
)
COST = (
    "Median computing time of an epoch with the method, on one thread; other work on the same computer may "
    "have slowed some epochs. Measuring norms is not counted."
)
