"""Training loops of other libraries. Each module needs its own; importing gradl1_fast needs none."""

__all__: list[str] = []
