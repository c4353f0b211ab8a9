"""Methods of rounding weights, by name or as objects, for :func:`gradl1_fast.round_weights`.

| name | class |
|---|---|
| ``"gptq"`` | :class:`GPTQ` |
| ``"adaround"`` | :class:`AdaRound` |
"""

from gradl1_fast.quantization.rounding.adaround import AdaRound
from gradl1_fast.quantization.rounding.base import Problem, RoundingMethod
from gradl1_fast.quantization.rounding.gptq import GPTQ

__all__ = ["GPTQ", "AdaRound", "Problem", "RoundingMethod"]
