"""Where the rows of an activation are: those of a slice of a wider one are further apart than they are long."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Return x [..., n], copied if it must be, and how many elements apart its rows are, each without gaps."""
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    is_evenly_spaced = all(stride == size * step for (_, stride), (size, step) in pairwise(outer))
    if x.stride(-1) != 1 or not is_evenly_spaced:
        return x.contiguous(), x.shape[-1]
    return x, outer[-1][1] if outer else x.shape[-1]
