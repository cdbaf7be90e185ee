"""What was measured: rows by part, with the machine and the command, to JSON and back without a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quarot_fx.errors import NotFoundError, OptionError


@dataclass(frozen=True)
class MatmulTime:
    """Times in microseconds of one product [tokens, columns] x [rows, columns]^T.

    Attributes:
        bfloat16: ``torch.mm``.
        quantize: the quantisation of the input alone.
        matmul: the integer product alone.
        total: both, one after the other.
    """

    rows: int
    columns: int
    tokens: int
    bfloat16: float
    quantize: float
    matmul: float
    total: float

    @property
    def speedup(self) -> float:
        """How many times faster than bfloat16 the whole is."""
        return self.bfloat16 / self.total

    @property
    def tera_operations(self) -> float:
        """10^12 multiplications and additions a second of the product alone."""
        return 2e-6 * self.rows * self.columns * self.tokens / self.matmul


@dataclass(frozen=True)
class PeerTime:
    """Time of the same product by another library, with the quantisation of its input.

    Attributes:
        peer: library and number format.
        microseconds: of one call, or ``None`` for the reason that there is none.
        speedup: over bfloat16 in the same run, likewise.
        reason: why there is no time.
    """

    peer: str
    rows: int
    columns: int
    tokens: int
    microseconds: float | None = None
    speedup: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class FusedTime:
    """Time of one kernel, and its rate next to that of a copy.

    Attributes:
        microseconds: of one call.
        gigabytes_per_second: of the bytes that must be read and written.
        of_copy: that rate over the rate at which a tensor of this size is copied.
    """

    kernel: str
    rows: int
    width: int
    microseconds: float
    gigabytes_per_second: float
    of_copy: float


@dataclass(frozen=True)
class AttentionTime:
    """Time of attention of one query in each of ``batch`` sequences to a cache.

    Attributes:
        keys: that the cache has for each sequence.
        attended: the first so many of them, by a mask; ``None`` is all of them without a mask.
        microseconds: of one call.
        gigabytes_per_second: of the bytes of keys and values that are attended to.
        pytorch: microseconds of the fastest of PyTorch's kernels in bfloat16, or ``None`` where none takes this.
        backend: which one that is.
        bits: of an element of keys and values; 16 are bfloat16.
    """

    batch: int
    keys: int
    attended: int | None
    microseconds: float
    gigabytes_per_second: float
    pytorch: float | None = None
    backend: str | None = None
    bits: int = 16

    @property
    def speedup(self) -> float | None:
        """How many times faster than PyTorch's kernel it is."""
        return None if self.pytorch is None else self.pytorch / self.microseconds


@dataclass(frozen=True)
class HadamardTime:
    """What an online Hadamard transform costs before one product: times in microseconds.

    Attributes:
        bfloat16: ``torch.mm`` alone.
        plain_quantize: silu x gate, quantise.
        rotated_quantize: silu x gate, Hadamard, quantise.
        plain, rotated: each of them and the product after it.
    """

    rows: int
    columns: int
    tokens: int
    bfloat16: float
    plain_quantize: float
    rotated_quantize: float
    plain: float
    rotated: float

    @property
    def cost(self) -> float:
        """The fraction by which the transform makes the whole slower."""
        return self.rotated / self.plain - 1


@dataclass(frozen=True)
class GatedTime:
    """What gating in the epilogue of a product saves: times in microseconds.

    Attributes:
        rows: of gate and up together.
        product: gate and up.
        quantize: silu x gate, Hadamard, quantise.
        separate: both, one after the other.
        gated_product: silu x gate, from one kernel.
        gated_quantize: Hadamard, quantise.
        gated: both, one after the other.
    """

    rows: int
    columns: int
    tokens: int
    product: float
    quantize: float
    separate: float
    gated_product: float
    gated_quantize: float
    gated: float

    @property
    def speedup(self) -> float:
        """How many times faster the whole is when it is gated in the epilogue."""
        return self.separate / self.gated


@dataclass(frozen=True)
class ModelTime:
    """Time and memory of a model with random weights, or of one of its decoder layers, in one phase.

    Attributes:
        model: whose shape it has.
        layers: how many decoder layers.
        backend: what compiled it.
        phase: ``"prefill"``: ``tokens`` at once, without a cache. ``"decode"``: one token after ``tokens`` in a cache.
        tokens: of each sequence.
        milliseconds: of one call, or ``None`` for the reason that there is none.
        compile_seconds: the first call, which compiles.
        graphs: that were compiled for it.
        cudagraph_skips: times that Inductor declined to make a CUDA graph.
        weight_bytes: held between calls, without the cache.
        cache_bytes: of keys and values.
        peak_bytes: allocated at once while it runs.
        compile_peak_bytes: allocated at once while it compiles.
        reason: why there is no time.
        sequences: that run together.
        cache_bits: of keys and values in the cache.
    """

    model: str
    layers: int
    backend: str
    phase: str
    tokens: int
    milliseconds: float | None = None
    compile_seconds: float | None = None
    graphs: int | None = None
    cudagraph_skips: int | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    compile_peak_bytes: int | None = None
    reason: str | None = None
    sequences: int = 1
    cache_bits: int = 16
    cache_bytes: int | None = None

    @property
    def work(self) -> tuple[str, str, int, int]:
        """What is compared: model, phase, sequences and tokens."""
        return self.model, self.phase, self.sequences, self.tokens

    @property
    def way(self) -> str:
        """How it was done: by which backend, and with which cache."""
        return self.backend if self.cache_bits == 16 else f"{self.backend}, {self.cache_bits}-bit cache"


@dataclass(frozen=True)
class MemoryUse:
    """Memory of a model with random weights that decodes a token, with a cache that has room for so many tokens.

    Attributes:
        model: whose shape it has.
        backend: what compiled it; ``"bfloat16"`` is the model as it is.
        cache_bits: of keys and values.
        sequences: that run together.
        tokens: of each, that the cache has room for.
        weight_bytes: held between steps, without the cache.
        cache_bytes: of keys and values, as the cache itself says.
        allocated_bytes: that the allocator gave when the cache was made; ``None`` if none was made.
        peak_bytes: allocated at once during a step; ``None`` if none was run.
        reason: why none could be run.
    """

    model: str
    backend: str
    cache_bits: int
    sequences: int
    tokens: int
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    allocated_bytes: int | None = None
    peak_bytes: int | None = None
    reason: str | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.tokens

    @property
    def way(self) -> str:
        """How it is run: by which backend, and with which cache."""
        return f"{self.backend}, {self.cache_bits}-bit cache"


@dataclass(frozen=True)
class CalibrationTime:
    """Time and memory of GPTQ on a model with random weights.

    Attributes:
        model: whose shape it has.
        layers: how many decoder layers.
        samples: sequences that it is calibrated on.
        tokens: of each.
        seconds: of it all, or ``None`` for the reason that there are none.
        weight_bytes: of the model, before.
        peak_bytes: allocated at once, the model among them.
        is_measured: whether a model of so many layers was calibrated; if not, it follows from smaller ones.
        reason: why there is no time.
    """

    model: str
    layers: int
    samples: int
    tokens: int
    seconds: float | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    is_measured: bool = True
    reason: str | None = None


@dataclass
class Record:
    """The rows of every part that was run.

    Attributes:
        environment: the command, versions and the device.
        matmul, peers, fused, attention, hadamard, gated, layers, models, memory, calibration: rows.
    """

    environment: Mapping[str, Any]
    matmul: list[MatmulTime] = field(default_factory=list)
    peers: list[PeerTime] = field(default_factory=list)
    fused: list[FusedTime] = field(default_factory=list)
    attention: list[AttentionTime] = field(default_factory=list)
    hadamard: list[HadamardTime] = field(default_factory=list)
    gated: list[GatedTime] = field(default_factory=list)
    layers: list[ModelTime] = field(default_factory=list)
    models: list[ModelTime] = field(default_factory=list)
    memory: list[MemoryUse] = field(default_factory=list)
    calibration: list[CalibrationTime] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write JSON, with what follows from the times next to them."""
        rows = {name: [_with_properties(row) for row in getattr(self, name)] for name in KINDS if getattr(self, name)}
        path.write_text(json.dumps({**self.environment, **rows}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read what :meth:`write` wrote.

        Raises:
            NotFoundError: there is no such file.
            OptionError: the file is something else.
        """
        if not path.is_file():
            raise NotFoundError(kind="file", name=str(path), remedy="Give one that --json wrote.")
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            rows = {name: [_of(kind, row) for row in written.pop(name, ())] for name, kind in KINDS.items()}
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            reason = f"is not a file that --json wrote: {type(error).__name__}: {error}"
            raise OptionError(name="from", value=str(path), reason=reason) from error
        return cls(written, **rows)


KINDS: dict[str, type[Any]] = {
    "matmul": MatmulTime,
    "peers": PeerTime,
    "fused": FusedTime,
    "attention": AttentionTime,
    "hadamard": HadamardTime,
    "gated": GatedTime,
    "layers": ModelTime,
    "models": ModelTime,
    "memory": MemoryUse,
    "calibration": CalibrationTime,
}


def _with_properties(row: Any) -> dict[str, Any]:
    derived = (name for name, value in vars(type(row)).items() if isinstance(value, property))
    return {**asdict(row), **{name: getattr(row, name) for name in derived}}


def _of(kind: type[Any], row: Mapping[str, Any]) -> Any:
    """Return a row; what was added to its kind after it was written is as before that."""
    return kind(**{f.name: row[f.name] for f in fields(kind) if f.name in row or f.default is MISSING})
