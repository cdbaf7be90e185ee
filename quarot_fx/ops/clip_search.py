"""Round-to-nearest weight quantisation with the best clip ratio of every group (QuaRot, section 5).

A scale below the one that reaches the largest magnitude clips a few values and rounds all others more finely.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.affine import code_range, group_count, split_groups, weight_scale_and_zero

# A search takes no data, and is done once for every group of a weight, of which some have a few large values: steps are
# fine, and go far down.
RATIOS = tuple(1 - step / 100 for step in range(80))
ERROR_NORM = 2.4
# Elements searched at a time. On a CPU no operator splits so few over threads: threads that meet after every operator
# are thirty times slower as soon as anything else runs on the machine, and the chunk stays in a core's cache.
CPU_CHUNK = 2**15
GPU_CHUNK = 2**24


@torch.no_grad()
def search_clip(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> Tensor:
    """Find for every group the ratio of 1.00, 0.99, ..., 0.21 that minimises the sum of |error|^2.4.

    Returns:
        [..., n / group]: the ratio, the largest where several are equally good; at least float32.
    """
    groups = split_groups(weight, group_count(weight, group))
    rows = groups.detach().flatten(0, -2)  # the threads below do not know of no_grad
    on_cpu = weight.device.type == "cpu"
    chunks = rows.split(max(1, (CPU_CHUNK if on_cpu else GPU_CHUNK) // rows.shape[-1]))
    with ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1) as pool:
        best = list(pool.map(lambda chunk: _best_steps(chunk.to(torch.float32), bits, symmetric), chunks))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    ratios = torch.tensor(RATIOS, dtype=dtype, device=weight.device)
    return ratios[torch.cat(best)].reshape(groups.shape[:-1])


def _best_steps(rows: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return the index into ``RATIOS`` of the best ratio for every row of [rows, n], float32."""
    lowest, highest = code_range(bits, signed=symmetric)
    extremes = torch.stack(rows.aminmax(dim=-1), -1)  # all that scales and zero points depend on
    ratios = rows.new_tensor(RATIOS)[:, None, None]
    scales, zeros = weight_scale_and_zero(extremes.expand(len(RATIOS), -1, -1), bits, None, ratios, symmetric)
    errors = rows.new_empty(len(RATIOS), len(rows))
    exact, error = torch.empty_like(rows), torch.empty_like(rows)
    for step, scale in enumerate(scales.float()):
        zero: Any = 0 if zeros is None else zeros[step].int()
        torch.mul(rows, 1 / scale, out=exact)
        torch.round(exact, out=error).clamp_(lowest - zero, highest - zero).sub_(exact)
        error.square_().log2_().mul_(ERROR_NORM / 2).exp2_()  # |error|^2.4, at half the cost of pow
        torch.sum(error, -1, out=errors[step])
    relative = scales[..., 0].float() / scales[0, :, 0]
    return errors.mul_(relative**ERROR_NORM).argmin(0)
