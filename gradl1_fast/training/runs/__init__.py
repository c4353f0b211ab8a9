"""Folders of training runs: launching, resuming, checkpoints, weights, records, sweeps and their reports."""
