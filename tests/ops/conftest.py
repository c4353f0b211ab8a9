from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gradl1_fast.backends import UnavailableError, backend, resolve


@pytest.fixture(params=["reference", "host"])
def each_cpu_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute with the reference and with the compiled loops, which otherwise hide the reference."""
    with backend(request.param):
        try:
            resolve("tap", torch.zeros(()))
        except UnavailableError as reason:
            pytest.skip(str(reason))
        yield
