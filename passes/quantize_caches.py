"""Keys and values are quantised where attention reads them, each head once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from quarot_fx.attention import Quantized, before_repetition, reads_of_keys_and_values
from quarot_fx.config import UNQUANTIZED_BITS, QuantScheme
from quarot_fx.errors import GroupSizeError
from quarot_fx.graph import Constants, Inserter, after, argument_nodes, module_path, replace_arguments
from quarot_fx.passes.base import Pass
from quarot_fx.passes.quantized import check_clip_is_known, insert_quantized
from quarot_fx.program import Program
from quarot_fx.quantized_reads import codes_of_cache
from quarot_fx.report import PassReport


@dataclass(frozen=True)
class QuantizeCaches(Pass):
    """``K, V -> scale (codes - zero)`` per token and head (QuaRot, section 4, stage 2c). An ordinary cache of
    the caller's keeps real numbers in the canonical basis: they are rotated and quantised at every read. One that holds
    codes has quantised them already, with bits of its own, and is read as it is.
    """

    requires: ClassVar[tuple[str, ...]] = ("rotate",)
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program, report: PassReport) -> None:
        constants = Constants(program.graph)
        made: dict[tuple[fx.Node, int, QuantScheme], fx.Node] = {}
        for read in list(reads_of_keys_and_values(program.graph)):
            scheme = self.config.key_scheme if read.kind == "key" else self.config.value_scheme
            where = module_path(read.user)
            if (codes := codes_of_cache(read)) is not None:
                if codes.bits == UNQUANTIZED_BITS:
                    report.decline(where, f"the cache holds a part of the {read.kind}s as codes, and a part not")
                else:
                    read.note(Quantized(codes.bits, "cache"))
                    report.matched += 1
                continue
            user, place = before_repetition(read)
            x = argument_nodes(user)[place]
            if scheme.bits == UNQUANTIZED_BITS:
                report.decline(where, f"{read.kind[0]}_bits=16 asks to leave {read.kind}s alone")
                continue
            if x in constants:
                report.decline(where, f"{read.kind}s are constant")
                continue
            check_clip_is_known(scheme, f"{read.kind[0]}_clip", f"a {read.kind} of {where}")
            dim = read.dim if user is read.user else -1
            size = x.meta["val"].shape[dim]
            if scheme.group is not None and size % scheme.group:
                raise GroupSizeError(
                    option="kv_group", group=scheme.group, size=size, where=f"a {read.kind} of {where}"
                )
            if (x, dim, scheme) not in made:
                insert = Inserter(program.graph, self.name, read.user)
                with program.graph.inserting_before(after(x)):
                    made[x, dim, scheme] = insert_quantized(insert, x, scheme, dim)
            replace_arguments(user, {place: made[x, dim, scheme]})
            read.note(Quantized(scheme.bits, "simulation"))
            report.matched += 1
