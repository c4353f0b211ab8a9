"""Benchmarks; each prints what it measures and writes it with the environment."""
