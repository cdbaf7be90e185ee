"""Other libraries' products of the same shape: each module is named after one, and imports it.

A module's ``FORMATS`` are the number formats that it is measured in, each with the bits of a weight and what makes of a
weight [rows, columns], in bfloat16, a function of activations [tokens, columns], in bfloat16, to [tokens, rows]. What
quantises activations is part of that function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor

from quarot_fx.bench.record import MatmulTime, PeerTime
from quarot_fx.bench.timing import microseconds, number_of_copies
from quarot_fx.errors import UnknownOptionError

Linear = Callable[[Tensor], Any]
Formats = dict[str, tuple[int, Callable[[Tensor], Linear]]]

PACKAGES = {"fp8_rowwise": "torch", "gemlite": "gemlite", "torchao": "torchao", "humming": "humming-kernels"}
NOT_INSTALLED = "not installed"


def check_peers(names: Sequence[str]) -> None:
    """Raise :class:`UnknownOptionError` if there is no such peer; the nearest name is suggested."""
    for name in names:
        if name not in PACKAGES:
            raise UnknownOptionError("peer", name, PACKAGES)


def measure_peers(names: Sequence[str], products: Sequence[MatmulTime]) -> Iterator[PeerTime]:
    """Measure what was measured already, all of one shape, by each peer in each of its formats.

    A peer that is missing, or that fails, gives rows with the reason.
    """
    for name in names:
        try:
            formats = _formats(name)
        except Exception as error:  # whatever another library raises when it is imported
            yield from (_failed(name, product, error) for product in products)
            continue
        for number_format, (bits, prepare) in formats.items():
            with _settings_restored():
                yield from _measure(f"{name} {number_format}", bits, prepare, products)


def _formats(name: str) -> Formats:
    version(PACKAGES[name])
    formats: Formats = importlib.import_module(f"{__name__}.{name}").FORMATS
    return formats


def _measure(
    peer: str, bits: int, prepare: Callable[[Tensor], Linear], products: Sequence[MatmulTime]
) -> Iterator[PeerTime]:
    rows, columns = products[0].rows, products[0].columns
    torch.compiler.reset()  # a peer that compiles does so for each shape, and Dynamo counts how often
    try:
        count = number_of_copies(rows * columns * bits // 8)
        linears = [prepare(_weight(rows, columns)) for _ in range(count)]
    except Exception as error:
        yield from (_failed(peer, product, error) for product in products)
        return
    for product in products:
        x = _input(product.tokens, columns)
        try:
            time = microseconds(lambda linear: linear(x), linears)  # noqa: B023
        except Exception as error:
            yield _failed(peer, product, error)
            continue
        yield PeerTime(peer, rows, columns, product.tokens, time, product.bfloat16 / time)


@contextmanager
def _settings_restored() -> Iterator[None]:
    """Undo what a library sets for itself, such as options of Inductor, before anything else is measured."""
    inductor, precision = torch._inductor.config.save_config(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch._inductor.config.load_config(inductor)
        torch.set_float32_matmul_precision(precision)


def _weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02


def _input(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)


def _failed(peer: str, product: MatmulTime, error: Exception) -> PeerTime:
    reason = NOT_INSTALLED if isinstance(error, PackageNotFoundError) else f"{type(error).__name__}: {error}"
    return PeerTime(peer, product.rows, product.columns, product.tokens, reason=reason)
