"""Constants made from weights, shared by all graphs of a model: prefill, decode and new shapes agree, at no cost.

An entry is found by how it was made: the expression and the identity and version of the parameters in it. It lives as
long as some graph holds it, and never outlives its parameters' identity.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from quarot_fx.errors import OriginalsFreedError
from quarot_fx.graph import AUTHOR, PARAMETER, stored_tensor


@dataclass(frozen=True)
class Expression:
    """How a constant is made.

    Attributes:
        structure: operators and arguments, parameters by number.
        leaves: the parameters.
    """

    structure: Hashable
    leaves: tuple[torch.Tensor, ...]

    @property
    def key(self) -> Hashable:
        """What identifies the value: the structure, and each parameter's identity and version."""
        return self.structure, tuple((WeakIdRef(leaf), version(leaf)) for leaf in self.leaves)


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
    version: tuple[int, int]  # of the content that was freed
    stamp: tuple[int, int]  # of the poison in its place


_FREED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_LIVE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # read by some compiled graph as they are
_POISON: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def free(tensor: torch.Tensor, name: str) -> None:
    """Release a weight's memory: it then reads as NaN, of its old shape, from one buffer that all freed weights share.

    Dynamo's guards still pass on such a tensor, and nothing can crash on it, which is not so of an emptied storage.
    """
    if tensor in _FREED or tensor in _LIVE:
        return
    key, before = (tensor.device, tensor.dtype), stamp(tensor)
    if key not in _POISON or _POISON[key].numel() < tensor.numel():
        _POISON[key] = torch.full((tensor.numel(),), torch.nan, dtype=tensor.dtype, device=tensor.device)
    tensor.data = _POISON[key][: tensor.numel()].view(tensor.shape)
    _FREED[tensor] = _Freed(name, before, stamp(tensor))


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
        raise OriginalsFreedError(parameter=freed.name, reason=reason)


def check_not_updated_after_freeing(tensor: torch.Tensor) -> None:
    """Raise :class:`OriginalsFreedError` if somebody wrote to a weight whose content was released."""
    freed = _FREED.get(tensor)
    if freed is not None and freed.stamp != stamp(tensor):
        raise OriginalsFreedError(parameter=freed.name, reason="it was updated in place")


def expression(node: fx.Node) -> Expression:
    """Return how a constant node is made, with the parameters numbered in order of appearance. What a pass stored
    besides parameters, such as rows to select, is known by its content: every graph has its own.
    """
    leaves: dict[int, torch.Tensor] = {}
    made: dict[fx.Node, Hashable] = {}

    def visit(current: fx.Node) -> Any:
        if current not in made:
            if current.op == "get_attr":
                leaf = stored_tensor(current)
                if AUTHOR in current.meta and PARAMETER not in current.meta and not leaf.is_meta:
                    made[current] = ("constant", leaf.dtype, leaf.shape, content(leaf))
                    return made[current]
                leaves[id(leaf)] = leaf
                made[current] = ("parameter", list(leaves).index(id(leaf)))
            else:
                arguments = fx.map_arg((current.args, current.kwargs), visit)
                made[current] = (str(current.target), str(arguments))
        return made[current]

    return Expression(visit(node), tuple(leaves.values()))


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
