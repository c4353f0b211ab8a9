"""The registered operators ``torch.ops.gradl1_fast.*`` with their derivatives, independent of backends."""

from gradl1_fast.ops import batch_norm_act, conv, fake_quantize, l1_norm, linear, tap
from gradl1_fast.ops._flops import register_when_counted

__all__ = ["batch_norm_act", "conv", "fake_quantize", "l1_norm", "linear", "tap"]

register_when_counted()
