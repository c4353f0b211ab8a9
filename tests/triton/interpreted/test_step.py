from tests.triton.checks.step import *  # noqa: F403  the GPU runs the same tests compiled
