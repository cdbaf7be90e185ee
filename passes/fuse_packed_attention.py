"""Attention of few queries to a cache of packed codes reads the codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from quarot_fx.aliasing import argument
from quarot_fx.attention import stand_for
from quarot_fx.graph import Inserter, module_path
from quarot_fx.passes.base import Pass
from quarot_fx.passes.fusion import insert_fused
from quarot_fx.program import Program
from quarot_fx.report import PassReport

quarot = torch.ops.quarot


@dataclass(frozen=True)
class Packed:
    """Keys or values that are stored as codes.

    Attributes:
        codes: packed, [..., bytes].
        scale, zero: [..., groups].
        bits: of a code.
        size: elements of a key or value.
    """

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node
    bits: int
    size: Any


@dataclass(frozen=True)
class FusePackedAttention(Pass):
    """``attend(q, dequantize(unpack(k)), dequantize(unpack(v))) -> attend_packed(q, k, v)``."""

    requires: ClassVar[tuple[str, ...]] = ("fuse-attention",)

    def run(self, program: Program, report: PassReport) -> None:
        for node in program.graph.find_nodes(op="call_function", target=quarot.attend.default):
            q, key, val, mask, scale = (argument(node, name) for name in ("q", "k", "v", "mask", "scale"))
            if not any(_is_stored(rows) for rows in (key, val)):
                continue
            k, v = _packed(key), _packed(val)
            if k is None or v is None:
                reason = _reason_against(key, "keys") if k is None else _reason_against(val, "values")
                report.decline(module_path(node), reason)
                continue
            insert = Inserter(program.graph, self.name, node)
            with program.graph.inserting_before(node):
                fused = insert_fused(
                    insert, self.config, report, quarot.attend_packed.default,
                    q, k.codes, k.scale, k.zero, v.codes, v.scale, v.zero, mask, scale, k.bits, v.bits, v.size,
                )  # fmt: skip
            if fused is not None:
                stand_for(fused, node)
                node.replace_all_uses_with(fused)


def _is_stored(rows: fx.Node) -> bool:
    """Whether keys or values are made of packed codes, in whatever way."""
    return _packed(rows) is not None or _packed(_before_rotation(rows)) is not None


def _before_rotation(rows: fx.Node) -> fx.Node:
    return rows.all_input_nodes[0] if rows.target is quarot.rotate.default else rows


def _packed(rows: fx.Node) -> Packed | None:
    """Return the codes that keys or values are made of, or ``None`` if they are of anything else."""
    if rows.target is not quarot.dequantize.default:
        return None
    unpacked, scale, zero = (argument(rows, name) for name in ("codes", "scale", "zero"))
    if unpacked.target is not quarot.unpack.default or zero is None or argument(unpacked, "signed"):
        return None
    codes, bits, size = (argument(unpacked, name) for name in ("packed", "bits", "size"))
    return Packed(codes, scale, zero, bits, size)


def _reason_against(rows: fx.Node, kind: str) -> str:
    if _packed(_before_rotation(rows)) is not None:
        return f"{kind} are rotated back before they are attended to"
    return f"{kind} are not stored as packed codes, and the others are"
