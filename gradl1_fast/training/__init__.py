"""Data, models and the training loop: what the demo, the benchmarks and the tests run."""
