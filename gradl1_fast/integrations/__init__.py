"""Integrations with the training loops of other libraries, which each module imports when it is used."""

__all__: list[str] = []
