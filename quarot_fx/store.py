"""Constants made from weights, shared by all graphs of a model: prefill, decode and new shapes agree, at no cost.

An entry is found by how it was made: the expression and the identity and version of the parameters in it. It lives as
long as some graph holds it, and never outlives its parameters' identity.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from quarot_fx.errors import OriginalsFreedError
from quarot_fx.graph import AUTHOR, PARAMETER, stored_tensor
from quarot_fx.nan_memory import nan_memory, restore_nan_memory


@dataclass(frozen=True)
class Expression:
    """How a constant is made.

    Attributes:
        structure: one call of an operator a line; arguments are ``$n``, the n-th parameter, ``%n``, the result of a
            line before, or literals.
        leaves: the parameters.
    """

    structure: tuple[str, ...]
    leaves: tuple[torch.Tensor, ...]

    @property
    def key(self) -> Hashable:
        """What identifies the value: the structure, and each parameter's identity and version."""
        return self.structure, tuple((WeakIdRef(leaf), version(leaf)) for leaf in self.leaves)

    def text(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the structure with names for the parameters, on whatever device they are: what is equal for two models
        whose parameters have equal names.
        """
        lines = (_LEAF.sub(lambda match: names[int(match[1])], line) for line in self.structure)
        return tuple(_DEVICE.sub("device", line) for line in lines)


_LEAF = re.compile(r"\$(\d+)")
_DEVICE = re.compile(r"device\(type='\w+'(, index=\d+)?\)")


def version(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is updated in place or given other storage.

    A freed tensor keeps the version of its last real content.
    """
    freed = _FREED.get(tensor)
    return freed.version if freed is not None else stamp(tensor)


def stamp(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what changes when anything at all is done to a tensor's content: its version and its address."""
    return (-1 if tensor.is_inference() else tensor._version), tensor.data_ptr()


# -- freeing originals -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Freed:
    name: str
    how: str
    version: tuple[int, int]  # of the content that was freed
    stamp: tuple[int, int]  # of the poison in its place


_FREED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_LIVE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # read by some compiled graph as they are


def free(tensor: torch.Tensor, name: str) -> None:
    """Release a weight's memory: it then reads as NaN, of its old shape, from memory that all freed weights share.

    Dynamo's guards still pass on such a tensor, and nothing can crash on it, which is not so of an emptied storage.
    """
    if tensor in _FREED or tensor in _LIVE or not tensor.is_floating_point():
        return
    before = stamp(tensor)
    tensor.data = _poison(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    _FREED[tensor] = _Freed(name, "was freed (free_originals=True)", before, stamp(tensor))


def without_content(like: torch.Tensor, device: torch.device, name: str) -> torch.Tensor:
    """Return a tensor, a parameter if ``like`` is one, that looks as if it was freed, on a device; it never held
    anything.
    """
    data = _poison(like.shape, like.stride(), like.dtype, device)
    tensor = torch.nn.Parameter(data, like.requires_grad) if isinstance(like, torch.nn.Parameter) else data
    _FREED[tensor] = _Freed(name, "was loaded without its content, from a checkpoint", stamp(tensor), stamp(tensor))
    return tensor


def _poison(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if shape.numel() else 0
    memory = nan_memory(size * dtype.itemsize, device)
    return memory[: size * dtype.itemsize].view(dtype).as_strided(shape, stride)


def keep_live(tensor: torch.Tensor) -> None:
    """Never free a tensor that a compiled graph reads as it is.

    Raises:
        OriginalsFreedError: it was freed already.
    """
    check_not_freed(tensor, "a graph reads it as it is")
    _LIVE[tensor] = True


def check_not_freed(tensor: torch.Tensor, reason: str) -> None:
    """Raise :class:`OriginalsFreedError` if a weight's content was released."""
    freed = _FREED.get(tensor)
    if freed is not None:
        raise OriginalsFreedError(parameter=freed.name, how=freed.how, reason=reason)


def check_not_updated_after_freeing(tensor: torch.Tensor) -> None:
    """Raise :class:`OriginalsFreedError` if somebody wrote to a weight whose content was released."""
    freed = _FREED.get(tensor)
    if freed is not None and freed.stamp != stamp(tensor):
        restore_nan_memory(tensor.device)
        raise OriginalsFreedError(parameter=freed.name, how=freed.how, reason="it was updated in place")


def expression(node: fx.Node) -> Expression:
    """Return how a constant node is made, with the parameters numbered in order of appearance. What a pass stored
    besides parameters, such as rows to select, is known by its content: every graph has its own.
    """
    leaves: dict[int, torch.Tensor] = {}
    lines: list[str] = []
    made: dict[fx.Node, str] = {}

    def visit(current: fx.Node) -> str:
        if current not in made:
            if current.op == "get_attr":
                made[current] = read(current)
            else:
                args = [_literal(argument, visit) for argument in current.args]
                args += [f"{name}={_literal(argument, visit)}" for name, argument in current.kwargs.items()]
                made[current] = f"%{len(lines)}"
                name = current.target if isinstance(current.target, torch._ops.OpOverload) else _python_name(current)
                lines.append(f"{name}({', '.join(args)})")
        return made[current]

    def read(current: fx.Node) -> str:
        leaf = stored_tensor(current)
        if AUTHOR in current.meta and PARAMETER not in current.meta and not leaf.is_meta:
            return f"constant({leaf.dtype}, {list(leaf.shape)}, {content(leaf)[:16].hex()})"
        leaves[id(leaf)] = leaf
        return f"${list(leaves).index(id(leaf))}"

    result = visit(node)
    return Expression(tuple(lines) if lines else (result,), tuple(leaves.values()))


def _python_name(call: fx.Node) -> str:
    return getattr(call.target, "__name__", str(call.target))


def _literal(argument: Any, visit: Callable[[fx.Node], str]) -> str:
    if isinstance(argument, fx.Node):
        return visit(argument)
    if isinstance(argument, list | tuple):
        return f"[{', '.join(_literal(one, visit) for one in argument)}]"
    return repr(argument)


_CONTENTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # digests


def content(tensor: torch.Tensor) -> bytes:
    """Return a digest of a tensor's content, which is computed once."""
    if tensor not in _CONTENTS:
        plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        _CONTENTS[tensor] = hashlib.blake2b(plain.tobytes()).digest()
    return _CONTENTS[tensor]


class WeightStore:
    """Weak storage of constants by :class:`Expression`."""

    def __init__(self) -> None:
        self._constants: weakref.WeakValueDictionary[Hashable, torch.Tensor] = weakref.WeakValueDictionary()

    def get(self, made: Expression, purpose: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the constant that ``made`` and ``purpose`` name, computing it if no graph holds it yet."""
        key = (purpose, made.key)
        constant = self._constants.get(key)
        if constant is None:
            constant = self._constants[key] = compute()
        return constant

    def __len__(self) -> int:
        return len(self._constants)


SHARED = WeightStore()
"""The store of everything that is compiled in this process."""
