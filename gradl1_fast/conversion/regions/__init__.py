"""Planned regions: several operations as one node of the autograd graph, run in four passes of raw calls."""
