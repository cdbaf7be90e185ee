"""Functionalisation of a captured graph: operators become functional, and inputs are written last.

The tracer's own functionalisation decomposes ``linear`` and ``scaled_dot_product_attention``, which the
passes want whole, so this one works from graph to graph. It is the classical scheme (ATen's
FunctionalTensorWrapper): every storage has one *base* node, and all other nodes that see the storage are
*views*, each with a parent. A write through a view is inverted link by link (``slice`` by ``slice_scatter``,
``transpose`` by ``permute``, ...) until it has made a new base; a read of an alias that a write left stale
replays its views on the new base.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._prims_common import make_contiguous_strides_for
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quarot_fx.aliasing import (
    COPIES,
    JOINS,
    PERMUTATIONS,
    RESHAPES,
    SCATTERS,
    argument,
    equal_sizes,
    functional_overload,
    inverse_permutation,
    is_alias,
    is_replayable,
    packet,
    same_layout,
    storage_keys,
    viewed,
    written_nodes,
)
from quarot_fx.graph import FROZEN, Inserter, fake_mode_of, stored_tensor, value

aten = torch.ops.aten


@dataclass(frozen=True)
class FunctionalizeReport:
    """What :func:`functionalize` did.

    Attributes:
        rewritten: names of the in-place operators that became functional, in order.
        mutated_inputs: names of the inputs and buffers that the epilogue writes, in order.
        frozen: nodes that share storage with what a remaining in-place operator writes, and why it remains.
            No edge to them may be rewritten; the nodes carry the reason in ``meta[FROZEN]`` too. They are made and
            read by copies, so that passes may move whatever else there is.
    """

    rewritten: tuple[str, ...]
    mutated_inputs: tuple[str, ...]
    frozen: dict[str, str]


def functionalize(gm: fx.GraphModule) -> FunctionalizeReport:
    """Make a pre-dispatch ATen graph functional, in place, up to an epilogue that writes the mutated inputs.

    Afterwards mutation is one ``aten.copy_(input, new value)`` per mutated placeholder or buffer, right
    before the output. Outputs have the values that they had, but those that aliased a mutated input or each
    other need not do so any more. What cannot be made functional stays as it was, and is reported.

    Args:
        gm: from ``make_fx(..., pre_dispatch=True)`` over fake inputs; ``meta["val"]`` tells what aliases.
    """
    return _Functionalizer(gm).run()


@dataclass
class _Storage:
    """One storage of the captured program."""

    nodes: list[fx.Node] = field(default_factory=list)
    version: int = 0  # number of writes so far
    is_output: bool = False
    obstacle: str | None = None  # why a write to it could not be followed through its aliases
    frozen: str | None = None  # why it keeps its in-place operators


@dataclass
class _Alias:
    """A node that sees a storage, and the node that has its content now."""

    storage: _Storage
    parent: Any  # the node that it is a view of; None for the base
    latest: fx.Node
    version: int = 0  # the storage's version when `latest` was made


class _Functionalizer:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.storages: dict[int, _Storage] = {}
        self.aliases: dict[fx.Node, _Alias] = {}
        self.sizes: dict[Any, fx.Node] = {}  # symbolic size -> a node that computes it
        self.replaced: list[fx.Node] = []
        self.rewritten: list[str] = []

    def run(self) -> FunctionalizeReport:
        self.graph.eliminate_dead_code(fx.Node.is_impure)  # tracing a scan leaves batched tensors behind
        self._find_aliases()
        self._freeze()
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                self._visit(node)
        mutated_inputs = self._write_inputs()
        for node in reversed(self.replaced):
            self.graph.erase_node(node)
        self.graph.eliminate_dead_code(fx.Node.is_impure)
        frozen = self._mark_frozen()
        self.graph.lint()
        self.gm.recompile()
        return FunctionalizeReport(tuple(self.rewritten), mutated_inputs, frozen)

    # -- analysis of the captured program -----------------------------------------------------

    def _find_aliases(self) -> None:
        fake_mode = fake_mode_of(self.graph)
        buffers: dict[Any, fx.Node] = {}
        for node in self.graph.nodes:
            is_stored = node.op == "get_attr" and isinstance(stored_tensor(node), torch.Tensor)
            if is_stored and getattr(node.meta.get("val"), "fake_mode", None) is not fake_mode:  # modes do not mix
                node.meta["val"] = fake_mode.from_tensor(stored_tensor(node), static_shapes=True)
            source = buffers.setdefault(node.target, node) if node.op == "get_attr" else viewed(node)
            if node.op == "output":
                for result in node.all_input_nodes:
                    for key in storage_keys(result) & self.storages.keys():
                        self.storages[key].is_output = True
            else:
                self._register(node, source)

    def _register(self, node: fx.Node, source: Any) -> None:
        """Note which storage a node sees, and as a view of which node."""
        keys = storage_keys(node)
        is_split = len(keys) == 1 and keys <= self.storages.keys()
        if not isinstance(value(node), torch.Tensor) and not is_split:
            for key in keys & self.storages.keys():
                self.storages[key].obstacle = f"{node.name} aliases it together with other tensors"
                self.storages[key].nodes.append(node)
            return  # the items of a tuple are registered when they are taken out
        for key in keys:
            known = self.aliases.get(source)
            if known and is_alias(node):
                self.storages[key] = known.storage  # fake kernels of dropout copy where the real ones do not
            storage = self.storages.setdefault(key, _Storage())
            parent = source if known and known.storage is storage and source is not node else None
            self.aliases[node] = _Alias(storage, parent, latest=node)
            if key < 0:
                storage.obstacle = f"what {node.name} aliases cannot be known: it has no storage"
            elif parent is None and storage.nodes:
                storage.obstacle = f"{node.name} and {storage.nodes[0].name} share it by no known view"
            elif parent is not None and not self._is_followed(node):
                storage.obstacle = f"{node.name} ({node.target}) cannot be taken again of new content"
            storage.nodes.append(node)

    def _is_followed(self, view: fx.Node) -> bool:
        """Whether the content of a view can be derived again after its parent was written."""
        known = is_replayable(view) or is_alias(view) or bool(written_nodes(view))
        return known or self._is_identity(view)  # such as type_as, whose schema does not say that it may alias

    def _freeze(self) -> None:
        """Find the storages whose in-place operators have to stay."""
        for node in self.graph.nodes:
            written = [self.aliases[target] for target in written_nodes(node) if target in self.aliases]
            reason = self._why_not_functional(node) if written else None
            for alias in written:
                frozen = reason or alias.storage.obstacle
                alias.storage.frozen = alias.storage.frozen or frozen
                if frozen and node not in alias.storage.nodes:
                    alias.storage.nodes.append(node)

    def _why_not_functional(self, node: fx.Node) -> str | None:
        target = node.target
        if not isinstance(target, OpOverload):
            return f"{target} mutates its operands"
        if torch.Tag.inplace_view in target.tags:
            return f"{target} changes the shape or storage of its operand in place"
        if functional_overload(target) is None:
            return f"{target} has no functional counterpart"
        view: Any = node.args[0]
        while (parent := self.aliases[view].parent) is not None:
            if not self._is_invertible(view):
                return f"{target} writes through {view.name} ({view.target}), which has no inverse"
            view = parent
        return None

    def _is_invertible(self, view: fx.Node) -> bool:
        return (
            view.target is operator.getitem  # the list that it comes from is the next link of the chain
            or packet(view) in JOINS
            or self._is_replaced(view)
            or self._is_identity(view)
            or view.target in SCATTERS
            or view.target is aten.narrow.default
            or packet(view) in PERMUTATIONS | RESHAPES
        )

    def _is_identity(self, view: fx.Node) -> bool:
        """Whether a view has its parent's dtype, sizes, strides and offset."""
        mine, parents = value(view), value(self.aliases[view].parent)
        return (
            isinstance(mine, torch.Tensor)
            and isinstance(parents, torch.Tensor)
            and mine.dtype == parents.dtype
            and equal_sizes(mine.shape, parents.shape)
            and equal_sizes(mine.stride(), parents.stride())
            and statically_known_true(mine.storage_offset() == parents.storage_offset())
        )

    def _is_replaced(self, node: fx.Node) -> bool:
        """Whether readers of a node get its parent: it is an alias, or what an in-place operator returns."""
        alias = self.aliases.get(node)
        return (
            alias is not None
            and alias.parent is not None
            and alias.storage.frozen is None
            and bool(is_alias(node) or written_nodes(node))
        )

    # -- rewriting ----------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        written = [target for target in written_nodes(node) if self._is_rewritable(target)]
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self._current)
        if isinstance(size := value(node), torch.SymInt):
            self.sizes.setdefault(size.node.expr, node)
        alias = self.aliases.get(node)
        if node.target is aten._assert_tensor_metadata.default:
            self.replaced.append(node)  # Dynamo's guards hold what it asserts
        elif written:
            self._rewrite(node, written[0])
        elif self._is_replaced(node):
            self.replaced.append(node)
        elif node.target is aten.lift_fresh_copy.default and alias and self._can_share_constant(node):
            alias.latest = node.all_input_nodes[0]
            self.replaced.append(node)
        elif alias:
            alias.version = alias.storage.version

    def _is_rewritable(self, target: fx.Node) -> bool:
        return target in self.aliases and self.aliases[target].storage.frozen is None

    def _can_share_constant(self, node: fx.Node) -> bool:
        """Whether a constant need not be copied: nobody outside gets the copy, and both become functional."""
        constant: Any = node.args[0]
        copy, constant = self.aliases[node].storage, self.aliases.get(constant)
        return not copy.is_output and not copy.frozen and not (constant and constant.storage.frozen)

    def _current(self, node: fx.Node) -> fx.Node:
        """Return a node with the content that ``node`` has at this point of the captured program."""
        alias = self.aliases.get(node)
        if alias is None or alias.storage.frozen:
            return node
        if self._is_replaced(node):
            return self._current(alias.parent)
        if alias.version != alias.storage.version:
            view: Any = node.target
            parent = self._current(alias.parent)
            alias.latest = self._insert(node).call(view, parent, *node.args[1:], **node.kwargs)
            alias.version = alias.storage.version
        return alias.latest

    def _rewrite(self, node: fx.Node, target: fx.Node) -> None:
        """Replace an in-place operator by a functional one, whose result all aliases of ``target`` show."""
        insert = self._insert(node)
        overload: Any = functional_overload(node.target)
        destination: Any = node.args[0]
        if node.target in COPIES:
            result: Any = node.args[1]
            if not equal_sizes(value(result).shape, value(destination).shape):
                result = insert.call(aten.expand.default, result, self._shape(destination, insert))
        elif node.target is aten.zero_.default:
            result = insert.call(overload, destination)
        else:
            rest = overload._schema.arguments[len(node.args) :]
            required = {p.name: argument(node, p.name) for p in rest if not p.has_default_value()}
            result = insert.call(overload, *node.args, **required | node.kwargs)
        before, after = value(destination), value(result)
        is_new = node.target not in COPIES
        if before.device != after.device:
            result, is_new = insert.call(aten.to.device, result, before.device, before.dtype), True
        elif before.dtype != after.dtype:
            result, is_new = insert.call(aten.to.dtype, result, before.dtype), True
        self._write(target, result, is_new, insert)
        self.replaced.append(node)
        self.rewritten.append(node.name)

    def _write(self, node: fx.Node, new: fx.Node, is_new: bool, insert: Inserter) -> None:
        """Make ``new`` the content of ``node``, by way of a new base.

        ``is_new`` says that ``new`` shares memory with no other value. One that does (the source of a
        ``copy_``) is copied: the base may be an output, or the source an input that the epilogue overwrites.
        """
        alias = self.aliases[node]
        if alias.parent is None:
            alias.latest = self._as_base(node, new, is_new, insert)
            alias.storage.version += 1
            alias.version = alias.storage.version
        elif self._is_replaced(node) or self._is_identity(node):
            self._write(alias.parent, new, is_new, insert)
        elif packet(node) in PERMUTATIONS:
            self._write(
                alias.parent,
                insert.call(aten.permute.default, new, inverse_permutation(node)),
                is_new,
                insert,
            )
        elif packet(node) in RESHAPES:
            shape = self._shape(self._current(alias.parent), insert)
            self._write(alias.parent, insert.call(aten.reshape.default, new, shape), is_new, insert)
        elif node.target is operator.getitem:
            whole = self._join(node, alias.parent, new, insert)
            self._write(self.aliases[alias.parent].parent, whole, True, insert)
        else:
            whole = self._scatter(node, self._current(alias.parent), new, insert)
            self._write(alias.parent, whole, True, insert)

    def _as_base(self, base: fx.Node, new: fx.Node, is_new: bool, insert: Inserter) -> fx.Node:
        """Give ``new`` memory of its own, laid out as the base was, on which the captured views are legal."""
        layout = value(base)
        if same_layout(value(new), layout.stride()):
            return new if is_new else insert.call(aten.clone.default, new)
        if same_layout(layout, make_contiguous_strides_for(layout.shape)):
            return insert.call(aten.clone.default, new, memory_format=torch.contiguous_format)
        return insert.call(aten.copy.default, self._current(base), new)

    def _scatter(self, view: fx.Node, whole: fx.Node, new: fx.Node, insert: Inserter) -> fx.Node:
        """Replace the part of ``whole`` that ``view`` shows."""
        if view.target in SCATTERS:
            return insert.call(SCATTERS[view.target], whole, new, *view.args[1:], **view.kwargs)
        axis, start, length = (argument(view, name) for name in ("dim", "start", "length"))  # narrow
        if isinstance(start, int) and start < 0:
            start = insert.call(operator.add, self._shape(whole, insert)[axis], start)
        is_constant = isinstance(start, int) and isinstance(length, int)
        end = start + length if is_constant else insert.call(operator.add, start, length)
        return insert.call(aten.slice_scatter.default, whole, new, axis, start, end)

    def _join(self, item: fx.Node, parts: Any, new: fx.Node, insert: Inserter) -> fx.Node:
        """Put the parts of a split together again, with ``new`` in the place of ``item``."""
        indices = range(len(value(parts)))
        replaced = indices[item.args[1]]  # type: ignore[index]
        latest = self._current(parts)
        whole = [new if i == replaced else insert.call(operator.getitem, latest, i) for i in indices]
        return insert.call(JOINS[packet(parts)], whole, argument(parts, "dim"))

    def _shape(self, node: fx.Node, insert: Inserter) -> list[Any]:
        """Return the sizes of a node as arguments: integers, and nodes for symbolic sizes."""
        shape: list[Any] = list(value(node).shape)
        for axis, size in enumerate(shape):
            if isinstance(size, torch.SymInt):
                if size.node.expr not in self.sizes:
                    self.sizes[size.node.expr] = insert.call(aten.sym_size.int, node, axis)
                shape[axis] = self.sizes[size.node.expr]
        return shape

    def _insert(self, like: fx.Node) -> Inserter:
        return Inserter(self.graph, "functionalize", like)

    # -- the result ---------------------------------------------------------------------------

    def _write_inputs(self) -> tuple[str, ...]:
        """Insert the epilogue and return the names of the inputs that it writes."""
        (output,) = self.graph.find_nodes(op="output")
        mutated = [
            (node, alias)
            for node, alias in self.aliases.items()
            if node.op in ("placeholder", "get_attr") and alias.parent is None and alias.latest is not node
        ]
        with self.graph.inserting_before(output):
            for node, alias in mutated:
                self._insert(alias.latest).call(aten.copy_.default, node, alias.latest)
        return tuple(node.name for node, _ in mutated)

    def _mark_frozen(self) -> dict[str, str]:
        reasons = {
            node: storage.frozen for storage in self.storages.values() for node in storage.nodes if storage.frozen
        }
        frozen = {}
        self._wall_in(reasons)
        for node in self.graph.nodes:
            if node in reasons:
                node.meta[FROZEN] = frozen[node.name] = reasons[node]
        return frozen

    def _wall_in(self, reasons: dict[fx.Node, str]) -> None:
        """Put copies around what stays mutable, so that a pass may move an operator: it reads a copy made in time."""
        for node in list(self.graph.nodes):
            if node in reasons:
                alias = self.aliases.get(node)
                if node.op == "call_function" and alias and alias.parent is None and _has_storage(node):
                    with self.graph.inserting_after(node):
                        copy = self._insert(node).call(aten.clone.default, node)
                    node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
                    reasons[copy] = reasons.pop(node)
            elif node.op == "call_function" and not written_nodes(node):
                with self.graph.inserting_before(node):
                    copies = {
                        source: self._insert(source).call(aten.clone.default, source)
                        for source in node.all_input_nodes
                        if source in reasons and _has_storage(source)
                    }
                for source, copy in copies.items():
                    node.replace_input_with(source, copy)


def _has_storage(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor) and all(key >= 0 for key in storage_keys(node))
