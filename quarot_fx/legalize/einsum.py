"""Two-operand sums over indices become matrix products."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quarot_fx.graph import FROZEN, Inserter, argument_nodes

aten = torch.ops.aten


def write_out_einsum(graph: fx.Graph) -> None:
    """``einsum("bhid,bhjd->bhij", q, k) -> q @ k^T``, with axes moved, merged and split around the product.

    An equation with another number of operands, with a diagonal, or with an index of one operand that is summed
    alone stays as it is.
    """
    for node in graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation = _parse(node)
        if equation is not None and FROZEN not in node.meta:
            with graph.inserting_before(node):
                product = _product(Inserter(graph, "legalize", node), node, equation)
            node.replace_all_uses_with(product)
            graph.erase_node(node)


@dataclass(frozen=True)
class _Equation:
    """The indices of two operands and of the result, one letter an axis; ``swapped`` if the operands are."""

    left: str
    right: str
    result: str
    swapped: bool = False

    @property
    def batch(self) -> str:
        return "".join(i for i in self.result if i in self.left and i in self.right)

    @property
    def contracted(self) -> str:
        return "".join(i for i in self.left if i in self.right and i not in self.result)

    def free(self, operand: str) -> str:
        """The result's indices that only this operand has."""
        return "".join(i for i in self.result if i in operand and i not in self.batch)

    @property
    def order(self) -> str:
        """The indices of the matrix product."""
        return self.batch + self.free(self.left) + self.free(self.right)


def _parse(node: fx.Node) -> _Equation | None:
    text, operands = str(node.args[0]).replace(" ", ""), argument_nodes(node)
    inputs, arrow, result = text.partition("->")
    if len(operands) != 2 or inputs.count(",") != 1:
        return None
    left, right = inputs.split(",")
    if not arrow:
        letters = re.sub(r"[^a-zA-Z]", "", inputs)
        result = "..." * ("..." in inputs) + "".join(sorted(i for i in set(letters) if letters.count(i) == 1))
    ranks = [operand.meta["val"].ndim for operand in operands]
    dots = [rank - len(part.replace("...", "")) for rank, part in zip(ranks, (left, right), strict=True)]
    spare = "".join(letter for letter in string.ascii_letters if letter not in text)[: max(dots)]
    left, right = (part.replace("...", spare[len(spare) - n :]) for n, part in zip(dots, (left, right), strict=True))
    equation = _Equation(left, right, result.replace("...", spare))
    if not _is_product(equation) or not _agree(equation, operands):
        return None
    swapped = _Equation(right, left, equation.result, swapped=True)
    return swapped if swapped.order == equation.result != equation.order else equation


def _is_product(equation: _Equation) -> bool:
    parts = (equation.left, equation.right, equation.result)
    summed_alone = (set(equation.left) ^ set(equation.right)) - set(equation.result)
    return all(len(set(part)) == len(part) for part in parts) and not summed_alone


def _agree(equation: _Equation, operands: Sequence[fx.Node]) -> bool:
    """Whether an index that both operands have has one size; einsum would repeat what has size 1."""
    left, right = (operand.meta["val"].shape for operand in operands)
    return all(
        statically_known_true(left[equation.left.index(i)] == right[equation.right.index(i)])
        for i in set(equation.left) & set(equation.right)
    )


def _product(insert: Inserter, node: fx.Node, equation: _Equation) -> fx.Node:
    operands = argument_nodes(node)
    left, right = operands[::-1] if equation.swapped else operands
    rows, columns, contracted = equation.free(equation.left), equation.free(equation.right), equation.contracted
    is_flat = not equation.batch  # then the rows need not be one axis
    sizes = dict(zip(equation.left + equation.right, (*_sizes(insert, left), *_sizes(insert, right)), strict=True))
    left = _permuted(insert, left, equation.left, equation.batch + rows + contracted)
    left = _merged(insert, left, len(equation.batch) + len(rows), len(contracted))
    left = left if is_flat and rows else _merged(insert, left, len(equation.batch), len(rows))
    right = _permuted(insert, right, equation.right, equation.batch + contracted + columns)
    right = _merged(insert, right, len(equation.batch) + len(contracted), len(columns))
    right = _merged(insert, right, len(equation.batch), len(contracted))
    product = insert.call(aten.matmul.default, left, right)
    product = _split(insert, product, [sizes[i] for i in columns])
    if not is_flat or not rows:
        product = _split(insert, product, [sizes[i] for i in rows], at=len(equation.batch))
    return _permuted(insert, product, equation.order, equation.result)


def _sizes(insert: Inserter, node: fx.Node) -> list[int | fx.Node]:
    shape = node.meta["val"].shape
    return [
        size if isinstance(size, int) else insert.call(aten.sym_size.int, node, dim) for dim, size in enumerate(shape)
    ]


def _permuted(insert: Inserter, node: fx.Node, indices: str, order: str) -> fx.Node:
    moved = [dim for dim, index in enumerate(order) if indices[dim] != index]
    if not moved:
        return node
    if len(moved) == 2:
        return insert.call(aten.transpose.int, node, *moved)
    return insert.call(aten.permute.default, node, [indices.index(index) for index in order])


def _merged(insert: Inserter, node: fx.Node, start: int, count: int) -> fx.Node:
    """Make ``count`` axes from ``start`` on one."""
    if count == 0:
        return insert.call(aten.unsqueeze.default, node, start)
    return node if count == 1 else insert.call(aten.flatten.using_ints, node, start, start + count - 1)


def _split(insert: Inserter, node: fx.Node, sizes: list[int | fx.Node], at: int = -1) -> fx.Node:
    """Undo :func:`_merged` on one axis."""
    at %= node.meta["val"].ndim
    if not sizes:
        return insert.call(aten.squeeze.dim, node, at)
    return node if len(sizes) == 1 else insert.call(aten.unflatten.int, node, at, sizes)
