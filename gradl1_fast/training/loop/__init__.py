"""The training loop: steps, precision, ranks, learning rates, averages, and the checks of each step."""
