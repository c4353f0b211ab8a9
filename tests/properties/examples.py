"""The number of examples per property: a few in CI, or as given to ``make fuzz``."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

VARIABLE = "GRADL1_TEST_EXAMPLES"


def examples(few: int, *, share: float = 1.0) -> settings:
    """Return the settings of a property.

    Args:
        few: examples where nothing else is asked for.
        share: of those asked for, for a property whose examples take long.
    """
    asked = os.environ.get(VARIABLE)
    count = few if asked is None else max(few, round(int(asked) * share))
    # Networks are large values, of which some do not fit a property.
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, suppress_health_check=slow)
