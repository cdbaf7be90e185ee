"""Matrices that balance the keys of an attention against its queries, by name, and sets of them for a whole model.

``q . k = (q A^-1) . (k A)`` for any invertible symmetric A. Noise that is the same in all channels of ``k A``, as
that of one scale for a whole key, then matters least if A makes keys small where queries are large.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quarot_fx.errors import BalanceSizeError, KeyBalancesFileError, NotABalanceError, UnknownBalanceError
from quarot_fx.rotation import DIGEST_LENGTH, FloatArray, Rotation, constant_of

HEADS, SIZE = -3, -1  # axes of what is balanced
SYMMETRIC = 1e-9  # relative difference of a matrix and its transpose
FILE, INDEX = "key_balances.safetensors", "key_balances"


@dataclass(frozen=True)
class Balance:
    """A positive definite matrix A [size, size] for each of some heads.

    Attributes:
        heads: number of matrices; each serves as many heads in a row as it takes for all.
        size: of a head.
        digest: of the matrices, which :meth:`of_matrices` makes known to the process.
    """

    heads: int
    size: int
    digest: str

    def __str__(self) -> str:
        return f"balance-{self.heads}x{self.size}-{self.digest}"

    @classmethod
    def of_matrices(cls, matrices: Tensor) -> Balance:
        """Return the balance by given matrices [heads, size, size], symmetric and positive definite, in float64.

        Raises:
            NotABalanceError: they are not.
        """
        given: FloatArray = matrices.detach().cpu().double().numpy()
        if given.ndim != 3 or given.shape[1] != given.shape[2] or not given.size:
            raise NotABalanceError(reason=f"their shape is {list(given.shape)}, not [heads, size, size]")
        transposed = given.swapaxes(1, 2)
        if not abs(given - transposed).max() <= SYMMETRIC * abs(given).max():  # NaN, too, is none
            raise NotABalanceError(reason="one is not symmetric")
        exact = (given + transposed) / 2
        if not np.linalg.eigvalsh(exact).min() > 0:
            raise NotABalanceError(reason="one is not positive definite")
        digest = hashlib.sha256(exact.astype("<f8").tobytes()).hexdigest()[:DIGEST_LENGTH]
        _GIVEN[digest] = exact
        return cls(given.shape[0], given.shape[1], digest)

    @classmethod
    def parse(cls, text: str) -> Balance:
        """Return the balance whose ``str`` is the text.

        Raises:
            UnknownBalanceError: there is none.
        """
        match = re.fullmatch(rf"balance-(\d+)x(\d+)-([0-9a-f]{{{DIGEST_LENGTH}}})", text)
        if match is None:
            raise UnknownBalanceError(name=text)
        return cls(int(match[1]), int(match[2]), match[3])

    def matrices(self, inverse: bool = False, rotation: str | None = None) -> Tensor:
        """Return A of all heads, or its inverse, times a rotation if one is named: float64 [heads, size, size].

        Raises:
            UnknownBalanceError: the process has not got them.
        """
        return torch.from_numpy(_products((self, inverse, rotation)).copy())

    def apply(self, x: Tensor, inverse: bool = False, rotation: str | None = None, rounded: bool = False) -> Tensor:
        """Return each head times its matrix: a new contiguous tensor with the shape and dtype of x.

        Args:
            x: floating point [..., heads n, tokens, size]; matrix i is for the heads from ``i n`` on.
            inverse: undo it.
            rotation: that the matrices are multiplied with before.
            rounded: the matrices have the dtype of x, as kernels take them, not float32 at least.

        Raises:
            BalanceSizeError: x has another number of heads, or heads of another size.
            UnknownBalanceError: the process has not got the matrices.
        """
        self.check_fits(x)
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        matrices = _constants((self, inverse, rotation), x if rounded else y).to(y.dtype)
        products = y.unflatten(HEADS, (self.heads, -1)) @ matrices[:, None]
        return products.flatten(-4, -3).to(x.dtype).contiguous()

    def check_fits(self, x: Tensor) -> None:
        """Raise a BalanceSizeError unless there is a matrix for each head of x [..., heads, tokens, size]."""
        if x.ndim < 3 or x.shape[SIZE] != self.size or x.shape[HEADS] % self.heads:
            raise BalanceSizeError(balance=self, shape=tuple(x.shape), heads=self.heads, size=self.size)


_GIVEN: dict[str, FloatArray] = {}  # by digest, as long as the process lives: a graph names no more than that


def _given(balance: Balance) -> FloatArray:
    if balance.digest not in _GIVEN:
        raise UnknownBalanceError(name=balance)
    return _GIVEN[balance.digest]


def _products(source: tuple[Balance, bool, str | None]) -> FloatArray:
    balance, inverse, rotation = source
    matrices = np.linalg.inv(_given(balance)) if inverse else _given(balance)
    if rotation is None:
        return matrices
    q = Rotation.parse(rotation).matrix().numpy()
    return matrices @ np.kron(np.eye(balance.size // len(q)), q)


_constants = constant_of(maxsize=256)(_products)


# -- of a model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyBalance:
    """How the keys of one layer are balanced.

    Attributes:
        where: the attention in the user's model; the first one that reads them, of several.
        balance: the matrices, by name.
    """

    where: str
    balance: str


class KeyBalances:
    """The balances of a model's keys, in the order of its layers, for ``options={"key_balance": ...}`` of the backend.

    Sets with the same matrices at the same places are equal.

    Attributes:
        name: that the process knows the set by, of its content.
        layers: one for each layer that has keys of its own.
    """

    def __init__(self, layers: Iterable[KeyBalance]) -> None:
        self.layers = tuple(layers)
        content = json.dumps([(one.where, one.balance) for one in self.layers])
        self.name = f"balances-{hashlib.sha256(content.encode()).hexdigest()[:DIGEST_LENGTH]}"
        _KNOWN[self.name] = self

    def find(self, where: str) -> str | None:
        """Return the balance of the keys that an attention reads first, or ``None``."""
        return next((one.balance for one in self.layers if one.where == where), None)

    def save(self, folder: str | Path) -> None:
        """Write the set to a folder, which is made if it is not there, as safetensors."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        matrices = {one.balance: Balance.parse(one.balance).matrices() for one in self.layers}
        index = json.dumps([[one.where, one.balance] for one in self.layers])
        save_file(matrices, Path(folder) / FILE, metadata={INDEX: index})

    @classmethod
    def load(cls, folder: str | Path) -> KeyBalances:
        """Return the set that a folder holds.

        Raises:
            KeyBalancesFileError: it holds none, or not what was written.
        """
        try:
            with safe_open(Path(folder) / FILE, framework="pt") as file:
                layers = [KeyBalance(where, name) for where, name in json.loads(file.metadata()[INDEX])]
                found = {name: str(Balance.of_matrices(file.get_tensor(name))) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise KeyBalancesFileError(folder=str(folder), reason=reason) from error
        if wrong := [one.balance for one in layers if found.get(one.balance) != one.balance]:
            raise KeyBalancesFileError(folder=str(folder), reason=f"the matrices of {wrong[0]} are not there")
        return cls(layers)

    @classmethod
    def known(cls, source: KeyBalances | Path | str) -> KeyBalances:
        """Return a set: as given, known to the process by its name, or that of a folder.

        Raises:
            KeyBalancesFileError: the folder holds none.
        """
        if isinstance(source, KeyBalances):
            return source
        return _KNOWN.get(str(source)) or cls.load(source)

    def __iter__(self) -> Iterator[KeyBalance]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyBalances) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<{len(self)} layers {self.name}>"


_KNOWN: dict[str, KeyBalances] = {}  # by name, as long as the process lives: options hold no more than that
