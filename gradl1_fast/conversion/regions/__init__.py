"""Planned regions: many operations as one node of the autograd graph, in four passes of raw calls."""
