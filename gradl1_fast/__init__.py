"""Training with gradient-l1 regularisation, and quantization on demand."""

__version__ = "0.1.0"
