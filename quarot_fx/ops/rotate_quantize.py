"""``quarot::rotate_quantize``: an activation, gated or alone, a change of basis, and the way into a linear layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quarot_fx.ops.activations import ACTIVATIONS, activated, check_activation
from quarot_fx.ops.declaration import OpDeclaration, declare
from quarot_fx.ops.quantize_activation import Operand, fake_operand, quantize_operand
from quarot_fx.ops.rotate import rotate
from quarot_fx.rotation import Rotation


def _reference(
    x: Tensor,
    gate: Tensor | None,
    activation: str,
    rotation: str,
    inner: int,
    bits: int,
    group: int | None,
    clip: float,
    symmetric: bool,
    container: torch.dtype,
) -> Operand:
    """Return ``quantize_activation`` of ``rotate(activation(gate) * x, rotation, -1, inner)``, [..., n].

    The product is rounded to the dtype of x, and all else computed in float32. With no gate, it is ``activation(x)``
    that takes the product's place.
    """
    y = activated(x, gate, activation).to(x.dtype)
    return quantize_operand(rotate(y.float(), rotation, -1, inner), bits, group, clip, symmetric, container)


def _fake(x: Tensor, gate: Tensor | None, activation: str, rotation: str, inner: int, *rest: Any) -> Operand:
    check_activation(activation)
    Rotation.parse(rotation).check_fits(x, -1, inner)
    bits, group, clip, symmetric, container = rest
    return fake_operand(x, bits, group, clip, symmetric, container)


def _inputs(generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
    int8, float8 = torch.int8, torch.float8_e4m3fn
    symmetric, asymmetric = (4, None, 0.9, True), (4, None, 0.95, False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for activation in ACTIVATIONS:
            x, gate = torch.randn(2, 3, 112, generator=generator).to(dtype)
            yield x, gate, activation, "hadamard-112", 1, *symmetric, int8
            yield x, None, activation, "hadamard-112", 1, *symmetric, int8
        x, gate = torch.randn(2, 3, 224, generator=generator).to(dtype).chunk(2, -1)  # halves of longer rows
        yield x, gate, "silu", "hadamard-112", 1, *symmetric, int8
        for n, rotation, inner in (
            (64, "hadamard-64", 1),
            (192, "hadamard-64", 1),  # blocks
            (160, "hadamard-5", 32),  # across five heads, by a Hartley matrix
            (240, "hadamard-12", 20),
            (512, "hadamard-512", 1),
            (3072, "hadamard-3072", 1),
            (44, "hadamard-44", 1),
            (72, "hadamard-72", 1),
        ):
            x = torch.randn(2, n, generator=generator).to(dtype)
            yield x, None, "identity", rotation, inner, *asymmetric, float8
    yield torch.zeros(3, 64), None, "identity", "hadamard-64", 1, *symmetric, int8
    yield torch.randn(9, 64, generator=generator), None, "identity", "hadamard-64", 1, 8, None, 1.0, True, int8
    yield torch.randn(2, 64, generator=generator), None, "identity", "random-hadamard-64-seed1", 1, *symmetric, int8
    yield torch.randn(2, 64, generator=generator), None, "identity", "hadamard-64", 1, 4, 16, 1.0, True, int8
    x = torch.randn(2, 64, 3, generator=generator).mT
    yield x, x, "sigmoid", "hadamard-64", 1, *symmetric, int8  # rows that lie across memory
    yield torch.zeros(0, 64), None, "identity", "hadamard-64", 1, *symmetric, int8


rotate_quantize = declare(
    OpDeclaration(
        schema="rotate_quantize(Tensor x, Tensor? gate, str activation, str rotation, int inner, int bits, int? group,"
        " float clip, bool symmetric, ScalarType container)"
        " -> (Tensor codes, Tensor scale, Tensor zero, Tensor sum)",
        reference=_reference,
        fake=_fake,
        inputs=_inputs,
        tolerance={torch.float32: 2.0**-8},  # of the scale: halves are rounded between two factors of a rotation
        code_flips=0.03,
    )
)
