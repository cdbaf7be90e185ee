import math

import pytest
import torch

from quarot_fx.errors import HadamardOrderError, OptionError
from quarot_fx.hadamard import Factor, hadamard, is_constructible, kronecker_factors

PALEY_I = (12, 20, 28, 44, 60, 68, 108, 140, 344)
PALEY_II = (36, 52, 76, 100, 148, 924)
KRONECKER = (1, 2, 4, 8, 64, 24, 56, 240, 720)
ORDERS = (
    1,
    2,
    3,
    9,
    12,
    14,
    15,
    28,
    36,
    64,
    128,
    387,
    576,
    1536,
    2112,
    4096,
    11008,
    13696,
    29568,
    41088,
    10007,
)


def family_orders(n: int) -> list[tuple[str, int]]:
    return [(factor.family, factor.order) for factor in kronecker_factors(n)]


@pytest.mark.parametrize("order", PALEY_I + PALEY_II + KRONECKER)
def test_rows_are_orthogonal_signs(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.dtype == torch.int8
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix.double() @ matrix.double().T, order * torch.eye(order, dtype=torch.float64))


def test_powers_of_two_are_sylvester_matrices() -> None:
    row, column = torch.arange(32)[:, None], torch.arange(32)
    parity = sum(((row & column) >> bit) & 1 for bit in range(5))
    assert torch.equal(hadamard(32), (1 - 2 * (parity % 2)).to(torch.int8))


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 10, 92, 156, 172, 428])
def test_orders_without_a_construction_are_errors(order: int) -> None:
    assert not is_constructible(order)
    with pytest.raises(HadamardOrderError, match=f"order {order}"):
        hadamard(order)


@pytest.mark.parametrize("family", ["hadamard", "hartley", "identity"])
@pytest.mark.parametrize("order", [1, 2, 12])
def test_factors_are_orthogonal(family: str, order: int) -> None:
    matrix = torch.from_numpy(Factor(family, order).array())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", ORDERS)
def test_factors_multiply_to_the_order_and_stay_small(n: int) -> None:
    factors = kronecker_factors(n)
    assert math.prod(factor.order for factor in factors) == n
    assert all(factor.order > 1 for factor in factors)
    assert all(factor.order <= 1024 for factor in factors if factor.family == "hadamard")
    assert all(factor.order <= 128 for factor in factors if factor.family == "hartley")
    assert [factor.family for factor in factors[1:]].count("identity") == 0


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (576, [("hadamard", 36), ("hadamard", 16)]),
        (1536, [("hadamard", 12), ("hadamard", 16), ("hadamard", 8)]),
        (4096, [("hadamard", 64), ("hadamard", 64)]),
        (11008, [("hadamard", 344), ("hadamard", 32)]),  # 4 x 43 = 172 has no construction here, 8 x 43 has
        (29568, [("hadamard", 12), ("hadamard", 28), ("hadamard", 44), ("hadamard", 2)]),  # not 924 x 32
        (9, [("hartley", 9)]),
        (14, [("hartley", 7), ("hadamard", 2)]),
        (13696, [("hartley", 107), ("hadamard", 16), ("hadamard", 8)]),
        (167 * 64, [("identity", 167), ("hadamard", 64)]),
        (10007, [("identity", 10007)]),
        (1, []),
    ],
)
def test_factorisation_is_searched_for_the_cheapest(n: int, expected: list[tuple[str, int]]) -> None:
    assert family_orders(n) == expected


def test_every_order_has_factors() -> None:
    assert all(math.prod(order for _, order in family_orders(n)) == n for n in range(1, 2000))


def test_an_order_below_one_is_an_error() -> None:
    with pytest.raises(OptionError, match="order=0"):
        kronecker_factors(0)
