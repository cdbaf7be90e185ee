"""Activations are quantised on their way into linear layers, dynamically."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from quarot_fx.config import UNQUANTIZED_BITS, QuantScheme
from quarot_fx.errors import GroupSizeError
from quarot_fx.graph import Inserter, after, replace_arguments
from quarot_fx.linear_like import linear_likes
from quarot_fx.passes.base import Pass
from quarot_fx.passes.quantized import check_clip_is_known, insert_quantized
from quarot_fx.program import Program
from quarot_fx.report import PassReport
from quarot_fx.roles import Roles


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """``x -> scale (codes - zero)`` per token or group, range taken from the data at run time (QuaRot, section 4,
    stage 2b).
    """

    requires: ClassVar[tuple[str, ...]] = ("rotate",)
    tolerance: ClassVar[float | None] = None

    def run(self, program: Program, report: PassReport) -> None:
        roles = Roles(program.graph, self.config)
        made: dict[tuple[fx.Node, QuantScheme], fx.Node] = {}
        for linear in list(linear_likes(program.graph)):
            scheme = self.config.for_parameter(linear.parameter).activation_scheme
            if why := roles.reason_to_keep_precision(linear):
                report.decline(linear.parameter, why)
                continue
            if scheme.bits == UNQUANTIZED_BITS:
                report.decline(linear.parameter, "a_bits=16 asks to leave its input alone")
                continue
            check_clip_is_known(scheme, "a_clip", f"the input of {linear.parameter}")
            x, size = linear.x, linear.x.meta["val"].shape[-1]
            if scheme.group is not None and size % scheme.group:
                raise GroupSizeError(
                    option="a_group", group=scheme.group, size=size, where=f"input of {linear.parameter}"
                )
            if (x, scheme) not in made:
                with program.graph.inserting_before(after(x)):
                    made[x, scheme] = insert_quantized(Inserter(program.graph, self.name, linear.node), x, scheme)
            replace_arguments(linear.node, {linear.spelling.x: made[x, scheme]})
            report.matched += 1
