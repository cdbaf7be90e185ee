"""Hadamard matrices of every order with a simple construction, and how to split an order for speed.

A Hadamard matrix has entries +-1 and orthogonal rows, so ``H / sqrt(n)`` is a rotation that spreads each
channel evenly over all of them: no outlier survives it (QuaRot, section 3). Orders are reached by Kronecker
products (Sylvester) and the squares of a finite field (Paley, "On orthogonal matrices", 1933), not by tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quarot_fx.errors import HadamardOrderError, OptionError

Signs = NDArray[np.int8]

LARGEST_HADAMARD_FACTOR = 1024
LARGEST_SYLVESTER_FACTOR = 64
LARGEST_HARTLEY_FACTOR = 128
PASS_COST = 32  # one more pass over the tensor costs about as much as 32 more multiply-adds per element


# -- construction ----------------------------------------------------------------------------------


@cache
def is_constructible(order: int) -> bool:
    """Whether :func:`hadamard` can build a matrix of this order."""
    if order in (1, 2):
        return True
    return order > 0 and order % 4 == 0 and (_kronecker_split(order) is not None or _paley(order) is not None)


def hadamard(order: int) -> Tensor:
    """Build a Hadamard matrix; for a power of two, Sylvester's.

    Returns:
        int8 tensor [order, order] of +-1, with ``H @ H.T == order * I``.

    Raises:
        HadamardOrderError: no construction used here reaches this order.
    """
    if not is_constructible(order):
        raise HadamardOrderError(order=order)
    return torch.from_numpy(_hadamard(order))


def _hadamard(order: int) -> Signs:
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    if split := _kronecker_split(order):
        return np.kron(*map(_hadamard, split))
    field = _paley(order)
    assert field is not None, f"order {order} was found constructible"
    conference = _conference(*field)
    identity = np.eye(len(conference), dtype=np.int8)
    if len(conference) == order:  # Paley I
        return conference + identity
    return np.kron(conference, _hadamard(2)) + np.kron(identity, np.array([[1, -1], [-1, -1]], np.int8))


def _kronecker_split(order: int) -> tuple[int, int] | None:
    splits = ((d, order // d) for d in _divisors(order)[1:-1])
    return next((split for split in splits if all(map(is_constructible, split))), None)


def _paley(order: int) -> tuple[int, int] | None:
    """Return p and k such that GF(p^k) gives this order: p^k + 1 (Paley I) or 2 (p^k + 1) (Paley II)."""
    for size, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if size % 4 == residue and (field := _prime_power(size)):
            return field
    return None


def _prime_power(size: int) -> tuple[int, int] | None:
    """Return the prime p and the k with ``size == p**k``, or ``None``."""
    if size < 2:
        return None
    prime = next((d for d in range(2, math.isqrt(size) + 1) if size % d == 0), size)
    exponent = round(math.log(size, prime))
    return (prime, exponent) if prime**exponent == size else None


def _conference(prime: int, exponent: int) -> Signs:
    """Build the conference matrix [q + 1, q + 1] of GF(q), q = prime^exponent: zero diagonal, else +-1."""
    size = prime**exponent
    radix = prime ** np.arange(exponent)  # an element's number is its polynomial's value at x = prime
    character = np.zeros(size, np.int8)
    powers = _powers_of_a_generator(prime, exponent)
    character[powers @ radix] = np.resize([1, -1], size - 1)  # the squares are the even powers
    elements = np.arange(size)[:, None] // radix % prime
    differences = (elements[:, None] - elements) % prime @ radix
    conference = np.ones((size + 1, size + 1), np.int8)
    conference[1:, 1:] = character[differences]
    conference[1:, 0] = 1 if size % 4 == 1 else -1  # symmetric where -1 is a square, else skew
    conference[0, 0] = 0
    return conference


def _powers_of_a_generator(prime: int, exponent: int) -> NDArray[np.int64]:
    """Return [q - 1, exponent]: the nonzero elements of GF(q) as powers g^0, g^1, ... of a generator g.

    An element is a polynomial in x below degree ``exponent``, lowest coefficient first. The modulus is chosen
    so that x itself is the generator: multiplying by x until 1 comes back must visit every element.
    """
    one = (1,) + (0,) * (exponent - 1)
    for modulus in itertools.product(range(1, prime), *[range(prime)] * (exponent - 1)):
        powers = [one]  # here x^exponent = modulus, a polynomial of lower degree
        while (element := _times_x(powers[-1], modulus, prime)) != one:
            powers.append(element)
        if len(powers) == prime**exponent - 1:
            return np.array(powers)
    raise AssertionError(f"GF({prime}^{exponent}) has no generator")  # pragma: no cover


def _times_x(element: tuple[int, ...], modulus: tuple[int, ...], prime: int) -> tuple[int, ...]:
    *low, high = element
    return tuple((a + high * b) % prime for a, b in zip((0, *low), modulus, strict=True))


# -- factorisation ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """A small orthogonal matrix, one factor of a Kronecker product.

    Attributes:
        family: ``"hadamard"``; ``"hartley"``, an orthogonal matrix that exists for every order; or
            ``"identity"``, which makes the product block-diagonal.
        order: its number of rows.
    """

    family: Literal["hadamard", "hartley", "identity"]
    order: int

    def array(self) -> NDArray[np.float64]:
        """Return the orthogonal matrix [order, order]."""
        if self.family == "hadamard":
            return _hadamard(self.order) / math.sqrt(self.order)
        if self.family == "identity":
            return np.eye(self.order)
        index = np.arange(self.order)
        angle = np.outer(index, index) % self.order * (2 * math.pi / self.order)
        return (np.cos(angle) + np.sin(angle)) / math.sqrt(self.order)


@cache
def kronecker_factors(n: int) -> tuple[Factor, ...]:
    """Split an order into small orthogonal factors whose Kronecker product, outermost first, is n x n.

    In order of preference: Hadamard factors alone; Hartley matrices for odd parts besides; as few identical
    diagonal blocks as possible, told by a leading identity factor. Among equals, the least arithmetic.
    Hartley matrices come first and powers of two last; these are Sylvester's and so is their product, which a
    kernel may split in another way.

    Raises:
        OptionError: n is not a positive integer.
    """
    if n < 1:
        raise OptionError(name="order", value=n, reason="must be 1 or more")
    for blocks in _divisors(n):
        if (factors := _odd_factors(n // blocks)) is not None:
            identity = (Factor("identity", blocks),) if blocks > 1 else ()
            rest = n // blocks // math.prod(factor.order for factor in factors)
            sylvester = (Factor("hadamard", order) for order in _sylvester_orders(rest))
            return (*identity, *sorted(factors, key=_hartley_first), *sylvester)
    raise AssertionError("n blocks of order 1 always exist")  # pragma: no cover


@cache
def _odd_factors(n: int) -> tuple[Factor, ...] | None:
    """Return the cheapest factors that leave a power of two of n, or ``None`` if there are none."""
    if n & (n - 1) == 0:
        return ()
    found = [(factor, *rest) for factor in _candidates(n) if (rest := _odd_factors(n // factor.order)) is not None]
    return min(found, key=_cost, default=None)


def _candidates(n: int) -> Iterator[Factor]:
    for order in _divisors(n):
        if order & (order - 1) == 0:
            continue
        if order <= LARGEST_HADAMARD_FACTOR and is_constructible(order):
            yield Factor("hadamard", order)
        elif order % 2 and order <= LARGEST_HARTLEY_FACTOR:
            yield Factor("hartley", order)


def _cost(factors: tuple[Factor, ...]) -> tuple[int, int]:
    hartleys = sum(factor.family == "hartley" for factor in factors)
    return hartleys, sum(factor.order + PASS_COST for factor in factors)


def _hartley_first(factor: Factor) -> tuple[bool, int]:
    return factor.family != "hartley", factor.order


def _sylvester_orders(power_of_two: int) -> list[int]:
    """Split a power of two as evenly as possible into the fewest factors that are small enough."""
    bits = power_of_two.bit_length() - 1
    count = -(-bits // (LARGEST_SYLVESTER_FACTOR.bit_length() - 1))
    return [2 ** ((bits + index) // count) for index in reversed(range(count))]


@cache
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return (*small, *(n // d for d in reversed(small) if d * d != n))
