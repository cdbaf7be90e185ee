"""The matrices that balance keys against queries, from what both are on calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quarot_fx.balance import Balance, KeyBalance, KeyBalances
from quarot_fx.calibration.programs import capture_programs
from quarot_fx.calibration.report import BalancedKeys
from quarot_fx.calibration.stream import Stream
from quarot_fx.config import UNQUANTIZED_BITS, QuarotConfig
from quarot_fx.errors import NothingToCalibrateError
from quarot_fx.graph import module_path
from quarot_fx.passes.balance_keys import reads_of_keys
from quarot_fx.progress import track

AS_IT_IS = QuarotConfig(w_bits=16, a_bits=16, kv_bits=UNQUANTIZED_BITS, rotation="none")
FLOOR = 1e-6  # of the largest variance: no direction of keys or queries counts as less


def find_key_balances(
    model: Callable[..., Any], sequences: Tensor, offload: bool
) -> tuple[KeyBalances, tuple[BalancedKeys, ...]]:
    """Find the balances of all keys of a model, as it is in full precision.

    Args:
        model: that is calibrated.
        sequences: token ids [n, length].
        offload: keep activations on the CPU while they wait.

    Raises:
        NothingToCalibrateError: no attention has keys that can be balanced.
    """
    programs = capture_programs(model, sequences[:1], AS_IT_IS)
    program = programs.rotated
    layers, _ = reads_of_keys(program.graph)  # compiling says why others cannot be balanced
    if not layers:
        raise NothingToCalibrateError
    wanted = [[reads[0].keys, *(read.query for read in reads)] for reads in layers]
    tokens, inputs = programs.token_input(program), programs.inputs(program)
    stream = Stream(
        program.graph, tokens, sequences.split(1), inputs, [node for nodes in wanted for node in nodes], offload
    )
    balances, reports = [], []
    for reads, nodes in zip(track(layers, "balances of keys"), wanted, strict=True):
        stream.advance(nodes)
        heads = nodes[0].meta["val"].shape[1]
        keys, *queries = [torch.stack([_moments(x, heads) for x in stream.values(node)]).sum(0) for node in nodes]
        stream.forget(nodes)
        matrices, noise = balancing(keys, torch.stack(queries).sum(0))
        where = module_path(reads[0].attention)
        balances.append(KeyBalance(where, str(Balance.of_matrices(matrices))))
        reports.append(BalancedKeys(where, noise.mean().item()))
    return KeyBalances(balances), tuple(reports)


def balancing(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the A with the least ``tr(A K A) tr(A^-1 Q A^-1)``, and the ratio of that to ``tr(K) tr(Q)``.

    That is the noise of scores where every channel of ``k A`` is rounded by steps of one size, which goes with the norm
    of ``k A``. A^2 is the geometric mean of K^-1 and Q.

    Args:
        keys: second moments K, float64 [..., size, size].
        queries: second moments Q, likewise.

    Returns:
        A [..., size, size], positive definite, and the ratio [...].
    """
    keys, queries = _regular(keys), _regular(queries)
    root, inverse_root = _power(keys, 0.5), _power(keys, -0.5)
    squared = inverse_root @ _power(root @ queries @ root, 0.5) @ inverse_root
    matrices, inverses = _power(squared, 0.5), _power(squared, -0.5)
    return matrices, _trace(matrices @ keys @ matrices) * _trace(inverses @ queries @ inverses)


def _moments(x: Tensor, heads: int) -> Tensor:
    """Return the second moments, float64 [heads, size, size], of x [batch, heads n, tokens, size]."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3)
    return (rows.mT @ rows).double()


def _regular(moments: Tensor) -> Tensor:
    """Return moments of trace 1, none of whose variances is nearly 0."""
    trace = _trace(moments)[..., None, None]
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    scaled = torch.where(trace > 0, moments / trace.clamp_min(torch.finfo(moments.dtype).tiny), identity)
    floored = _power(scaled, 1)
    return floored / _trace(floored)[..., None, None]


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values = values.clamp_min(FLOOR * values[..., -1:]) ** exponent
    return (vectors * values[..., None, :]) @ vectors.mT


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
