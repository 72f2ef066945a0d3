"""The index buffer of attention: derived, kept in state dicts for other libraries' sake, judged when it is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference

_BFLOAT16 = 1 / 128  # the relative step of its numbers


def is_rounded(index: Tensor, resolution: int) -> bool:
    """Whether `index` is the standard one of a [resolution, resolution] map, damaged by averaging or a low precision.

    Averages of integers are rounded down, again with each step: `found` may lie below the standard entry, but not by
    more than half of it and 1. bfloat16 rounds up as well. Indices of other networks lie above in some entries.
    """
    standard = reference.bias_index(resolution, resolution, torch.device("cpu")).double()
    if index.shape != standard.shape or index.is_meta or index.is_complex():
        return False
    found = index.cpu().double()
    return bool(((found >= standard / 2 - 1) & (found >= 0) & (found <= standard * (1 + _BFLOAT16))).all())


def why_unusable(index: Tensor, resolution: int) -> str | None:
    """The reason why an index buffer belongs to another network; None for the standard one, damaged or not."""
    return None if is_rounded(index, resolution) else reference.why_other_index(index, resolution)
