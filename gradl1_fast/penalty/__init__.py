"""The gradient-l1 penalty, by exact double backprop or by a finite difference, and its checks."""

from gradl1_fast.penalty.gradl1 import GradL1

__all__ = ["GradL1"]
