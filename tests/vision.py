"""Makes torchvision importable if its compiled half was built for another torch, as with CPU builds.

It then fails at import, and with it timm and lightning, which use none of its operators but import it.
"""

from __future__ import annotations

import torch

__all__ = ["make_importable"]

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: list[torch.library.Library] = []  # a declaration lasts as long as its library


def make_importable() -> None:
    """Declare the operators that torchvision's import asks for, unless it has them or is not there."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error) or _library:
            raise
        _library.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _library[0].define(name + _BOXES)
        make_importable()
