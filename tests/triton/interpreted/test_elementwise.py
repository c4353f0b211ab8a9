from tests.triton.checks.elementwise import *  # noqa: F403  the GPU runs the same tests compiled
