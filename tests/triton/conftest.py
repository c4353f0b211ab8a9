from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("tests.triton.checks")
# The interpreter is chosen when Triton is imported: those tests run in a process of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
