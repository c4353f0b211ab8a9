from tests.triton.checks.prepared import *  # noqa: F403  the GPU runs the same tests compiled
