"""What a checkpoint says about itself: the model, the options, and every tensor. As JSON it is part of the index of the
shards, so that replacing that one file replaces the checkpoint.

What is read is checked field by field: an index may come from anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from quarot_fx.checkpoint.damage import damaged
from quarot_fx.errors import CheckpointVersionError
from quarot_fx.ops.pack import packed_size

FORMAT = 2
DTYPES = {  # by the name that safetensors has for each
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD_NAME = re.compile(r"[\w][\w.-]*\.safetensors", re.ASCII)  # of a file in the folder itself


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a shard.

    Attributes:
        dtype: one of ``DTYPES``.
        shape: its sizes.
        shard: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: str


@dataclass(frozen=True)
class Shard:
    """A file of tensors.

    Attributes:
        size: in bytes.
        sha256: of the whole file, in hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class ModelTensor:
    """A parameter or a buffer of the model.

    Attributes:
        dtype: one of ``DTYPES``.
        shape, stride: its layout.
        stored: the tensor in a shard that is its content; ``None`` if nothing but constants made of it is needed.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    stored: str | None


@dataclass(frozen=True)
class Value:
    """A constant that is stored as it is.

    Attributes:
        how: the expression that it is the value of.
        tensor: in a shard.
    """

    how: tuple[str, ...]
    tensor: str


@dataclass(frozen=True)
class Codes:
    """The results of ``quarot::quantize_weight``.

    Attributes:
        how: the expression that they are the results of.
        packed: the tensor in a shard that ``quarot::pack`` made of the codes, uint8 [..., rows, bytes].
        scale: bfloat16 [..., rows, groups].
        zero: uint8 [..., rows, groups]; ``None`` if codes are symmetric.
        bits: of a code.
        size: codes in a row.
    """

    how: tuple[str, ...]
    packed: str
    scale: str
    zero: str | None
    bits: int
    size: int


@dataclass(frozen=True)
class Learned:
    """A learned rotation.

    Attributes:
        rotation: its name.
        absorbed_by: the axes of weights that absorb it.
        tensor: the matrix, float64 [order, order], in a shard.
    """

    rotation: str
    absorbed_by: tuple[str, ...]
    tensor: str


@dataclass(frozen=True)
class Balanced:
    """How the keys of a layer are balanced.

    Attributes:
        where: the attention in the model.
        balance: name of the matrices.
        tensor: the matrices, float64 [heads, size, size], in a shard.
    """

    where: str
    balance: str
    tensor: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint.

    Attributes:
        versions: of quarot_fx, torch and transformers, that made it.
        model_class: name of the class of the model.
        transformers: what :mod:`~quarot_fx.checkpoint.skeleton` builds the model from; ``None`` if it has to be given.
        options: fields of :class:`~quarot_fx.config.QuarotConfig` that constants depend on.
        plan: the rotation plan of the first graph, as :meth:`~quarot_fx.basis.plan.RotationPlan.as_dict` has it.
        model: parameters and buffers, by name.
        tied: other names of these -> the name that they have in ``model``.
        values, codes: constants.
        learned: the rotations that the options name, if they were learned.
        balances: of keys, that the options name, if they do.
        tensors: all that is stored, by name.
        shards: by the name of the file.
    """

    versions: Mapping[str, str]
    model_class: str
    transformers: Mapping[str, Any] | None
    options: Mapping[str, Any]
    plan: Mapping[str, Any]
    model: Mapping[str, ModelTensor]
    tied: Mapping[str, str]
    values: tuple[Value, ...]
    codes: tuple[Codes, ...]
    learned: tuple[Learned, ...] = ()
    balances: tuple[Balanced, ...] = ()
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    shards: Mapping[str, Shard] = field(default_factory=dict)

    def as_index(self) -> dict[str, Any]:
        """Return an index of shards, as all readers of safetensors know it, with this in its metadata."""
        elements = (DTYPES[one.dtype].itemsize * math.prod(one.shape) for one in self.tensors.values())
        return {
            "metadata": {"total_size": sum(elements), "quarot": {"format": FORMAT, **asdict(self)}},
            "weight_map": {name: one.shard for name, one in self.tensors.items()},
        }

    @classmethod
    def from_index(cls, index: Any, folder: str) -> Manifest:
        """Read and check an index.

        Raises:
            CheckpointVersionError: it is in another format than ``FORMAT``.
            CheckpointFormatError: it cannot be the index of a checkpoint.
        """
        return _Reader(folder).manifest(index)


class _Reader:
    """Takes JSON apart; whatever is not as it has to be is an error that names its place."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def manifest(self, index: Any) -> Manifest:
        data = self._get(self._get(self._is(index, dict, "the index"), "metadata", dict), "quarot", dict)
        version = self._get(data, "format", int)
        if version != FORMAT:
            remedy = "Save the model again, or install the quarot_fx that made it: " + repr(data.get("versions"))
            reason = f"it is in format {version}, and this quarot_fx reads format {FORMAT}"
            raise CheckpointVersionError(folder=self._folder, reason=reason, remedy=remedy)
        shards = {
            self._shard_name(name): Shard(self._count(one, "size"), self._digest(one))
            for name, one in self._items(data, "shards")
        }
        tensors = {name: self._tensor(one, shards) for name, one in self._items(data, "tensors")}
        model = {name: self._model_tensor(name, one, tensors) for name, one in self._items(data, "model")}
        tied = {name: self._known(self._is(of, str, name), model) for name, of in self._get(data, "tied", dict).items()}
        description = data.get("transformers")
        return Manifest(
            versions={name: self._is(v, str, name) for name, v in self._get(data, "versions", dict).items()},
            model_class=self._get(data, "model_class", str),
            transformers=None if description is None else self._is(description, dict, "transformers"),
            options=self._get(data, "options", dict),
            plan=self._get(data, "plan", dict),
            model=model,
            tied=tied,
            values=tuple(self._value(one, tensors) for one in self._get(data, "values", list)),
            codes=tuple(self._codes(one, tensors) for one in self._get(data, "codes", list)),
            learned=tuple(self._learned(one, tensors) for one in self._get({"learned": [], **data}, "learned", list)),
            balances=tuple(
                self._balanced(one, tensors) for one in self._get({"balances": [], **data}, "balances", list)
            ),
            tensors=tensors,
            shards=shards,
        )

    def _tensor(self, data: Any, shards: Mapping[str, Shard]) -> TensorInfo:
        return TensorInfo(
            self._dtype(data), self._sizes(data, "shape"), self._known(self._get(data, "shard", str), shards)
        )

    def _model_tensor(self, name: str, data: Any, tensors: Mapping[str, TensorInfo]) -> ModelTensor:
        stored = data.get("stored")
        one = ModelTensor(
            self._dtype(data),
            self._sizes(data, "shape"),
            self._sizes(data, "stride"),
            None if stored is None else self._known(self._is(stored, str, "stored"), tensors),
        )
        if len(one.stride) != len(one.shape):
            self._fail(f"{name} has {len(one.shape)} sizes and {len(one.stride)} strides")
        if one.stored is not None:
            self._check_layout(one.stored, tensors, one.dtype, one.shape)
        elif not DTYPES[one.dtype].is_floating_point:
            self._fail(f"{name} is of {one.dtype} and has no content")
        return one

    def _value(self, data: Any, tensors: Mapping[str, TensorInfo]) -> Value:
        return Value(self._how(data), self._known(self._get(data, "tensor", str), tensors))

    def _codes(self, data: Any, tensors: Mapping[str, TensorInfo]) -> Codes:
        zero = data.get("zero")
        one = Codes(
            self._how(data),
            self._known(self._get(data, "packed", str), tensors),
            self._known(self._get(data, "scale", str), tensors),
            None if zero is None else self._known(self._is(zero, str, "zero"), tensors),
            self._count(data, "bits"),
            self._count(data, "size"),
        )
        if not 2 <= one.bits <= 8:
            self._fail(f"{one.packed} has codes of {one.bits} bits")
        rows = tensors[one.packed].shape[:-1]
        self._check_layout(one.packed, tensors, "U8", (*rows, packed_size(one.size, one.bits)))
        groups = tensors[one.scale].shape[-1:]
        self._check_layout(one.scale, tensors, "BF16", (*rows, *groups))
        if one.zero is not None:
            self._check_layout(one.zero, tensors, "U8", (*rows, *groups))
        return one

    def _learned(self, data: Any, tensors: Mapping[str, TensorInfo]) -> Learned:
        absorbed_by = tuple(self._is(one, str, "absorbed_by") for one in self._get(data, "absorbed_by", list))
        one = Learned(
            self._get(data, "rotation", str), absorbed_by, self._known(self._get(data, "tensor", str), tensors)
        )
        order = tensors[one.tensor].shape[:1]
        self._check_layout(one.tensor, tensors, "F64", (*order, *order))
        return one

    def _balanced(self, data: Any, tensors: Mapping[str, TensorInfo]) -> Balanced:
        tensor = self._known(self._get(data, "tensor", str), tensors)
        heads, size = (*tensors[tensor].shape[:2], 0, 0)[:2]
        self._check_layout(tensor, tensors, "F64", (heads, size, size))
        return Balanced(self._get(data, "where", str), self._get(data, "balance", str), tensor)

    def _check_layout(self, name: str, tensors: Mapping[str, TensorInfo], dtype: str, shape: tuple[int, ...]) -> None:
        found = tensors[name]
        if (found.dtype, found.shape) != (dtype, shape):
            self._fail(f"{name} is {found.dtype} {list(found.shape)} and has to be {dtype} {list(shape)}")

    def _how(self, data: Any) -> tuple[str, ...]:
        return tuple(self._is(line, str, "how") for line in self._get(data, "how", list))

    def _digest(self, data: Any) -> str:
        digest = self._get(data, "sha256", str)
        return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else self._fail(f"{digest!r} is no SHA-256")

    def _dtype(self, data: Any) -> str:
        return self._known(self._get(data, "dtype", str), DTYPES)

    def _sizes(self, data: Any, name: str) -> tuple[int, ...]:
        return tuple(self._is_count(size, name) for size in self._get(data, name, list))

    def _count(self, data: Any, name: str) -> int:
        return self._is_count(self._get(data, name, int), name)

    def _is_count(self, value: Any, where: str) -> int:
        if self._is(value, int, where) < 0 or value >= 2**63:
            self._fail(f"{where} is {value}")
        return value

    def _shard_name(self, name: str) -> str:
        return name if _SHARD_NAME.fullmatch(name) else self._fail(f"{name!r} cannot be the name of a shard")

    def _known(self, name: str, known: Mapping[str, Any]) -> str:
        return name if name in known else self._fail(f"{name!r} is named and not described")

    def _items(self, data: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
        return [(key, self._is(one, dict, f"{name}.{key}")) for key, one in self._get(data, name, dict).items()]

    def _get(self, data: Any, name: str, kind: type) -> Any:
        if name not in data:
            self._fail(f"its index has no {name!r}")
        return self._is(data[name], kind, name)

    def _is(self, value: Any, kind: type, where: str) -> Any:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self._fail(f"{where} is {type(value).__name__}, not {kind.__name__}")
        return value

    def _fail(self, reason: str) -> Any:
        raise damaged(self._folder, reason)
