"""Build entry point; everything static is declared in pyproject.toml."""

from setuptools import setup

setup()
