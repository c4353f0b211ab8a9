"""Measurements: run the modules of this package with ``python -m bench.<name>``."""
