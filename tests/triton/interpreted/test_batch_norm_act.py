from tests.triton.checks.batch_norm_act import *  # noqa: F403  the GPU runs the same tests compiled
