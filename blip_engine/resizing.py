"""Pillow's bicubic resize on the engine's device, to within one level of 255.

Pillow resizes in two passes with 8 bits between them (Pillow's `src/libImaging/Resample.c`), which cuts off what
overshoots at an edge. One pass over both dimensions, as torch's is by default, differs by up to 25 levels there; two
passes with the same rounding differ by one in less than a thousandth of the values.
"""

from typing import Final

import PIL
import torch
from torch import Tensor
from torch.nn import functional as F

#: From this version on, tall images are resized vertically first, which is less work.
_REORDERS: Final = 13


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (H, W, 3), on any device, squashed to `size` (h, w): uint8 (3, h, w)."""
    levels = pixels.permute(2, 0, 1)[None].float()
    for step in _steps((pixels.shape[0], pixels.shape[1]), size):
        levels = F.interpolate(levels, step, mode="bicubic", antialias=True).add_(0.5).floor_().clamp_(0, 255)
    return levels[0].to(torch.uint8)


def _steps(given: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
    """The size after each pass; a dimension that fits already needs none."""
    (height, width), (h, w) = given, size
    vertical_first = _pillow() >= _REORDERS and height > max(h, 2 * width - w)  # found by trying, for square sizes
    between = (h, width) if vertical_first else (height, w)
    steps = [step for step in (between, size) if step != given]
    return steps if len(steps) < 2 or steps[0] != steps[1] else steps[:1]


def _pillow() -> int:
    return int(PIL.__version__.partition(".")[0])
