"""Embedding tables that are asked for by name become packed integer codes with scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from quarot_fx.config import UNQUANTIZED_BITS
from quarot_fx.graph import Constants, Inserter, argument_nodes, parameters_of
from quarot_fx.passes.base import Pass
from quarot_fx.passes.quantized import insert_packed
from quarot_fx.program import Program
from quarot_fx.report import PassReport

aten, quarot = torch.ops.aten, torch.ops.quarot


@dataclass(frozen=True)
class QuantizeEmbeddings(Pass):
    """``E[ids] -> scale[ids] (codes[ids] - zero[ids])`` per row or group; only rows that are read are unpacked."""

    requires: ClassVar[tuple[str, ...]] = ("rotate",)
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        for node in list(program.graph.find_nodes(op="call_function", target=aten.embedding.default)):
            table, ids = argument_nodes(node)[:2]
            if table not in constants:
                continue
            parameter = parameters_of(table)[0]
            scheme = self.config.for_parameter(parameter).weight_scheme
            if scheme.clip == "output":  # a table has none
                scheme = replace(scheme, clip="search")
            if not self.config.override_for(parameter):
                report.decline(parameter, "it is an embedding; name it in overrides to quantise it")
                continue
            if scheme.bits == UNQUANTIZED_BITS:
                report.decline(parameter, "w_bits=16 asks to leave it alone")
                continue
            insert, size = Inserter(program.graph, self.name, node), table.meta["val"].shape[-1]
            with program.graph.inserting_before(node):
                stored = insert_packed(insert, table, scheme, parameter, dim=-1)
                rows, scale, zero = (part and insert.call(aten.embedding.default, part, ids) for part in stored)
                codes = insert.call(quarot.unpack.default, rows, scheme.bits, size, scheme.symmetric)
                new = insert.call(quarot.dequantize.default, codes, scale, zero, table.meta["val"].dtype)
            node.replace_all_uses_with(new)
            report.matched += 1
            report.weights += 1
