"""What reaches a layer whose weight is to be rounded, row by row; and what would have reached it in the float model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

from torch import Tensor, fx

from quarot_fx.calibration.options import GPTQOptions
from quarot_fx.calibration.products import Product
from quarot_fx.calibration.programs import Programs
from quarot_fx.calibration.stream import Stream
from quarot_fx.graph import argument_nodes
from quarot_fx.program import Program


class LayerInputs:
    """The inputs of one group of layers after another, in the order of the groups.

    Args:
        programs: the model.
        sequences: token ids [n, length].
        groups: of layers that share an input.
        options: whose target says whether the float model runs alongside.
        offload: keep values on the CPU while they wait.
    """

    def __init__(
        self,
        programs: Programs,
        sequences: Tensor,
        groups: Sequence[Sequence[Product]],
        options: GPTQOptions,
        offload: bool,
    ) -> None:
        def stream(program: Program, wanted: list[fx.Node]) -> Stream:
            tokens, inputs = programs.token_input(program), programs.inputs(program)
            return Stream(program.graph, tokens, sequences.split(1), inputs, wanted, offload)

        self._stream = stream(programs.quantized, [node for group in groups for node in _read(group)])
        self._float: Stream | None = None
        self._float_x: dict[fx.Node, fx.Node] = {}  # input of a layer -> input of the same layer in the float model
        if options.target == "model":
            nodes = {node.name: node for node in programs.rotated.graph.nodes}
            for product in (group[0] for group in groups if group[0].route is None):
                operands = argument_nodes(nodes[product.linear.node.name])
                self._float_x[product.x] = operands[product.linear.spelling.x]
            self._float = stream(programs.rotated, list(self._float_x.values()))

    def advance_to_source(self, group: Sequence[Product]) -> None:
        """Run the model up to what is quantised to be the input of a group."""
        self._stream.advance([*group[0].read[1:], group[0].source])

    def advance(self, group: Sequence[Product]) -> None:
        """Run the model up to the input of a group; the codes of all groups before it have to be there."""
        self._stream.advance(group[0].read)
        if self._float and self.has_target(group):
            self._float.advance([self._float_x[group[0].x]])

    def has_target(self, group: Sequence[Product]) -> bool:
        """Whether it is known what the float model has in the place of a group's rows: not where rows are routed, since
        each of the models routes its own.
        """
        return group[0].x in self._float_x and group[0].route is None

    def sources(self, group: Sequence[Product], matrix: int) -> Iterator[Tensor]:
        """Yield, for one sequence after another, the rows [m, n] that meet one matrix, as they are before they are
        quantised.
        """
        product = group[0]
        routes = repeat(None) if product.route is None else self._stream.values(product.route)
        for x, route in zip(self._stream.values(product.source), routes, strict=False):
            yield product.rows(x, route, matrix)

    def rows(self, group: Sequence[Product], matrix: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield, for one sequence after another, the rows [m, n] that meet one matrix of a group's weights, and those
        of the float model, if they are known.
        """
        product = group[0]
        targets = (
            self._float.values(self._float_x[product.x]) if self._float and self.has_target(group) else repeat(None)
        )
        routes = repeat(None) if product.route is None else self._stream.values(product.route)
        for x, route, target in zip(self._stream.values(product.x), routes, targets, strict=False):
            yield product.rows(x, route, matrix), None if target is None else product.rows(target, None, matrix)

    def release(self, group: Sequence[Product]) -> None:
        """Let go of what is no longer read, when a group is done."""
        self._stream.forget(_read(group))
        if self._float and self.has_target(group):
            self._float.forget([self._float_x[group[0].x]])


def _read(group: Sequence[Product]) -> list[fx.Node]:
    """Return the nodes whose values tell a group's rows, before and after they are quantised."""
    return list(dict.fromkeys([group[0].source, *group[0].read]))
