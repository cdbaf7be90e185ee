"""The pair of nodes that takes an activation to integer codes and back."""

from __future__ import annotations

import operator

import torch
from torch import fx

from quarot_fx.config import QuantScheme
from quarot_fx.graph import Inserter

quarot = torch.ops.quarot


def insert_quantized(insert: Inserter, x: fx.Node, scheme: QuantScheme) -> fx.Node:
    """Insert ``dequantize(quantize(x))`` over the last axis and return its node."""
    quantize = quarot.quantize_symmetric.default if scheme.symmetric else quarot.quantize_asymmetric.default
    parts = insert.call(quantize, x, scheme.bits, scheme.group, scheme.clip)
    codes, scale = insert.call(operator.getitem, parts, 0), insert.call(operator.getitem, parts, 1)
    zero = None if scheme.symmetric else insert.call(operator.getitem, parts, 2)
    return insert.call(quarot.dequantize.default, codes, scale, zero, x.meta["val"].dtype)
