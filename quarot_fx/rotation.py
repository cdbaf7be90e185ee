"""Orthogonal matrices that a short text names, the same on every machine, applied without being formed."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from quarot_fx.errors import (
    NotOrthogonalError,
    OptionError,
    RotationSizeError,
    UnknownMatrixError,
    UnknownOptionError,
)
from quarot_fx.hadamard import Factor, kronecker_factors

FloatArray = NDArray[np.floating]

TEXT_FORMS = {
    "hadamard": "hadamard-<order>",
    "random-hadamard": "random-hadamard-<order>-seed<seed>",
    "random": "random-<order>-seed<seed>",
    "learned": "learned-<order>-<digest>",
}
DENSE = ("random", "learned")
DIGEST_LENGTH = 16  # of a given matrix, in hexadecimal digits
ORTHOGONAL = 1e-6  # how far from the identity an entry of Q Q^T may be for Q to count as orthogonal
EXACT = 1e-12  # and for it to be taken as it is


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [order, order]; it rotates a row vector x to ``x @ Q``.

    Attributes:
        kind: ``"hadamard"``, Q = H / sqrt(order); ``"random-hadamard"``, Q = diag(signs) H / sqrt(order) with
            random signs (QuaRot, section 3); ``"random"``, any orthogonal matrix, dense, expensive online; or
            ``"learned"``, a given one, likewise. H / sqrt(order) is the product of ``kronecker_factors``, also where no
            Hadamard matrix is known.
        order: number of rows, 1 or more.
        seed: of the randomness, 0 or more. Rotations of another kind, order or seed are independent.
        digest: of a given matrix, which :meth:`of_matrix` makes known to the process.

    Raises:
        UnknownOptionError: there is no such kind.
        OptionError: the order or the seed is out of range.
    """

    kind: str
    order: int
    seed: int = 0
    digest: str = ""

    def __post_init__(self) -> None:
        if self.kind not in TEXT_FORMS:
            raise UnknownOptionError("kind of rotation", self.kind, TEXT_FORMS)
        if self.order < 1:
            raise OptionError(name="order", value=self.order, reason="must be 1 or more")
        if self.seed < 0:
            raise OptionError(name="seed", value=self.seed, reason="must be 0 or more")
        if bool(self.digest) != (self.kind == "learned"):
            raise OptionError(name="digest", value=self.digest, reason="is that of a given matrix: see of_matrix")
        if self.kind == "hadamard":
            object.__setattr__(self, "seed", 0)  # it has no randomness: equal matrices are equal rotations

    def __str__(self) -> str:
        fields = {"<order>": str(self.order), "<seed>": str(self.seed), "<digest>": self.digest}
        return re.sub("<.*?>", lambda field: fields[field[0]], TEXT_FORMS[self.kind])

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> Rotation:
        """Return the rotation by a given matrix, which the process then knows by the digest of its content.

        Args:
            matrix: [order, order], floating point, orthogonal to 1e-6; the orthogonal matrix that is nearest to it is
                taken, in float64.

        Raises:
            NotOrthogonalError: it is not.
        """
        exact = _nearest_orthogonal(matrix)
        digest = hashlib.sha256(exact.astype("<f8").tobytes()).hexdigest()[:DIGEST_LENGTH]
        _GIVEN[digest] = exact
        return cls("learned", len(exact), digest=digest)

    @classmethod
    def parse(cls, text: str) -> Rotation:
        """Return the rotation whose ``str`` is the text.

        Raises:
            UnknownOptionError: there is none; the nearest form is suggested.
        """
        return _parse(text)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The orthogonal factors, outermost first, of H / sqrt(order); none when Q is dense."""
        return () if self.kind in DENSE else kronecker_factors(self.order)

    @property
    def flops_per_element(self) -> float:
        """Multiply-adds per element of the rotated tensor."""
        if self.kind in DENSE:
            return float(self.order)
        return float(sum(factor.order for factor in self.factors if factor.family != "identity"))

    def description(self) -> str:
        """Say how Q is built, for a report: ``"Hadamard 12 x 16 x 8"`` or ``"4 blocks of Hadamard 64"``."""
        if self.kind in DENSE:
            return f"{self.kind} orthogonal {self.order}"
        orders = {
            family: " x ".join(str(factor.order) for factor in run)
            for family, run in groupby(self.factors, key=lambda factor: factor.family)
        }
        blocks = orders.pop("identity", None)
        product = " x ".join(f"{family.capitalize()} {text}" for family, text in orders.items())
        text = f"{blocks} blocks of {product}" if blocks and product else product or "identity"
        return f"{text} with random signs" if self.kind == "random-hadamard" else text

    def matrix(self) -> Tensor:
        """Return Q, dense: float64 [order, order] on the CPU. For tests and small orders."""
        with _ordinary_tensors():
            return self.apply(torch.eye(self.order, dtype=torch.float64, device="cpu"))

    def apply(
        self,
        x: Tensor,
        dim: int = -1,
        inner: int = 1,
        inverse: bool = False,
        dtype: torch.dtype | None = None,
        matrix: Tensor | None = None,
    ) -> Tensor:
        """Rotate one axis of a tensor, by a few small matrix products.

        Args:
            x: floating point, of any shape and strides.
            dim: the axis; its size is outer x order x inner, row-major, and Q acts on the middle factor.
            inner: size of the innermost factor.
            inverse: apply Q^T, which undoes Q.
            dtype: to compute in, and to round to after every factor; float32 at least, if none is given.
            matrix: [order, order], in the place of Q.

        Returns:
            A new contiguous tensor with the shape and dtype of x.

        Raises:
            RotationSizeError: the axis has no such factors.
            UnknownMatrixError: Q is a given matrix that the process does not know.
        """
        self.check_fits(x, dim, inner)
        dim, order = dim % x.dim(), self.order
        outer = math.prod(x.shape[:dim]) * (x.shape[dim] // (order * inner))
        tail = math.prod(x.shape[dim + 1 :]) * inner
        y = x.to(dtype or torch.promote_types(x.dtype, torch.float32)).reshape(outer, order, tail)
        if matrix is not None:
            y = _rotate_axis(y, matrix.to(y.dtype), inverse)
        elif self.kind in DENSE:
            y = _rotate_axis(y, (_random_orthogonal if self.kind == "random" else _given)(self, y), inverse)
        elif self.kind == "random-hadamard" and not inverse:
            y = self._rotate_by_factors(y * _random_signs(self, y)[:, None], inverse)
        elif self.kind == "random-hadamard":
            y = self._rotate_by_factors(y, inverse) * _random_signs(self, y)[:, None]
        elif self.flops_per_element:
            y = self._rotate_by_factors(y, inverse)
        else:
            y = y.clone()  # the identity, too, returns a new tensor
        return y.to(x.dtype).reshape(x.shape).contiguous()

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the constant tensors that :meth:`apply` reads, ahead of its first call."""
        with _ordinary_tensors():
            self.apply(torch.empty(1, self.order, device=device, dtype=dtype), dtype=dtype)

    def check_fits(self, x: Tensor, dim: int = -1, inner: int = 1) -> None:
        """Check that the axis of x is outer x order x inner.

        Raises:
            RotationSizeError: it is not.
        """
        if x.shape[dim] % (self.order * inner):
            shape = tuple(x.shape)
            raise RotationSizeError(rotation=self, dim=dim, shape=shape, order=self.order, inner=inner)

    def _rotate_by_factors(self, y: Tensor, inverse: bool) -> Tensor:
        outer, after, tail = y.shape
        before = 1
        for factor in self.factors:
            after //= factor.order
            if factor.family != "identity":
                y = y.reshape(outer * before, factor.order, after * tail)
                y = _rotate_axis(y, _factor_matrix(factor, y), inverse)
            before *= factor.order
        return y.reshape(outer, before, tail)


def _rotate_axis(y: Tensor, matrix: Tensor, inverse: bool) -> Tensor:
    """Multiply the middle axis of [outer, order, tail] by a matrix [order, order] or its transpose."""
    matrix = matrix.mT if inverse else matrix
    return (y[..., 0] @ matrix)[..., None] if y.shape[-1] == 1 else matrix.mT @ y


@lru_cache(maxsize=1024)
def _parse(text: str) -> Rotation:
    match = re.fullmatch(rf"(.+?)-(\d+)(?:-seed(\d+)|-([0-9a-f]{{{DIGEST_LENGTH}}}))?", text)
    if match and match[1] in TEXT_FORMS:
        rotation = Rotation(match[1], int(match[2]), int(match[3] or 0), match[4] or "")
        if str(rotation) == text:
            return rotation
    raise UnknownOptionError("rotation", text, TEXT_FORMS.values())


# -- given matrices --------------------------------------------------------------------------------

_GIVEN: dict[str, FloatArray] = {}  # by digest, as long as the process lives: a graph names no more than that


def _nearest_orthogonal(matrix: Tensor) -> FloatArray:
    """Return the orthogonal matrix that is nearest to one that is orthogonal to 1e-6; one that is exact as it is."""
    given: FloatArray = matrix.detach().cpu().double().numpy()
    if given.ndim != 2 or given.shape[0] != given.shape[1] or not given.size:
        raise NotOrthogonalError(reason=f"its shape is {list(matrix.shape)}, not that of a square")
    deviation = float(abs(given @ given.T - np.eye(len(given))).max())
    if not deviation <= ORTHOGONAL:  # NaN, too, is none
        raise NotOrthogonalError(
            reason=f"Q Q^T differs from the identity by {deviation:.1e}, and may by {ORTHOGONAL:.0e}"
        )
    if deviation <= EXACT:
        return given.copy()
    left, _, right = np.linalg.svd(given)
    return left @ right


# -- constant tensors ------------------------------------------------------------------------------


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Make tensors that hold data and may be used later in any mode, whatever mode the caller is in."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


def constant_of(maxsize: int) -> Callable[[Callable[[Any], FloatArray]], Callable[[Any, Tensor], Tensor]]:
    """Decorate ``f(source) -> array`` to ``f(source, like) -> tensor`` of like's device and dtype, cached."""

    def decorate(make: Callable[[Any], FloatArray]) -> Callable[[Any, Tensor], Tensor]:
        make = lru_cache(maxsize)(make)

        @lru_cache(maxsize)
        def cached(source: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
            with _ordinary_tensors():
                return torch.from_numpy(make(source)).to(device, dtype)

        @wraps(make)
        def constant(source: Any, like: Tensor) -> Tensor:
            # Fake tensor modes and tracers accept a real tensor from outside only if it is lifted.
            return torch.ops.aten.lift_fresh(cached(source, like.device, like.dtype))

        return constant

    return decorate


@constant_of(maxsize=256)
def _factor_matrix(factor: Factor) -> FloatArray:
    return factor.array()


@constant_of(maxsize=256)
def _random_signs(rotation: Rotation) -> FloatArray:
    """Draw +-1 [order], one bit each."""
    bits = np.unpackbits(_random_bytes(rotation, -(-rotation.order // 8)), bitorder="little")
    return 1.0 - 2.0 * bits[: rotation.order]


@constant_of(maxsize=2)
def _random_orthogonal(rotation: Rotation) -> FloatArray:
    """Draw an orthogonal matrix [order, order], uniformly (Haar): the Q of a Gaussian matrix."""
    order = rotation.order
    words = _random_bytes(rotation, 8 * (order * order + order % 2)).view("<u8")
    uniform = ((words >> 11) + 1) * 2.0**-53  # in (0, 1], so that the logarithm is finite
    radius, angle = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
    gaussian = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])  # Box-Muller
    q, r = np.linalg.qr(gaussian[: order * order].reshape(order, order))
    return q * np.copysign(1.0, np.diagonal(r))  # unique, and Haar, once R's diagonal is positive


@constant_of(maxsize=256)
def _given(rotation: Rotation) -> FloatArray:
    """Look up a given matrix [order, order]."""
    if rotation.digest not in _GIVEN:
        raise UnknownMatrixError(rotation=rotation)
    return _GIVEN[rotation.digest]


def _random_bytes(rotation: Rotation, count: int) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_256(str(rotation).encode()).digest(count), np.uint8)
