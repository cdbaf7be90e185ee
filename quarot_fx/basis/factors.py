"""What an axis is made of. A view that splits an axis splits its factor, everywhere that this factor occurs."""

from __future__ import annotations

from collections.abc import Iterable


class Factors:
    """Factors of axes, under unification: a union-find whose classes can also be split.

    A factor is an ``int`` handle. Two factors are unified when some operator needs them in the same basis or
    moves one into the other; a class is split when a view splits one of its members.
    """

    def __init__(self) -> None:
        self._size: list[int] = []
        self._parent: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}

    def new(self, size: int) -> int:
        """Return a new factor of ``size`` elements, in a class of its own."""
        self._size.append(size)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def size(self, factor: int) -> int:
        """Return the number of elements of a factor."""
        return self._size[factor]

    def leaves(self, factors: Iterable[int]) -> list[int]:
        """Return the class representatives that the factors consist of now, outermost first."""
        found: list[int] = []
        pending = list(factors)[::-1]
        while pending:
            factor = self._find(pending.pop())
            parts = self._parts.get(factor)
            if parts is None:
                found.append(factor)
            else:
                pending.extend(reversed(parts))
        return found

    def unify(self, left: Iterable[int], right: Iterable[int]) -> bool:
        """Make two row-major products of factors equal, splitting where one is finer than the other.

        Returns:
            False if the boundaries do not nest (6 = 2 x 3 against 3 x 2). Factors may be split then, never wrongly.
        """
        left, right = self.leaves(left), self.leaves(right)
        if not _nest([self._size[x] for x in left], [self._size[x] for x in right]):
            return False
        a, b = left[::-1], right[::-1]
        while a and b:
            x, y = self._find(a.pop()), self._find(b.pop())
            if x in self._parts or y in self._parts:  # split meanwhile, as another member of its class
                a.extend(reversed(self.leaves([x])))
                b.extend(reversed(self.leaves([y])))
            elif self._size[x] == self._size[y]:
                self._parent[y] = x
            elif max(self._size[x], self._size[y]) % min(self._size[x], self._size[y]):
                return (
                    False  # a factor that occurs twice was split at its first place, and so moved the boundaries here
                )
            elif self._size[x] > self._size[y]:
                a.extend(reversed(self._split(x, self._size[y])))
                b.append(y)
            else:
                b.extend(reversed(self._split(y, self._size[x])))
                a.append(x)
        return True

    def _find(self, factor: int) -> int:
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor

    def _split(self, factor: int, outer: int) -> tuple[int, int]:
        self._parts[factor] = (self.new(outer), self.new(self._size[factor] // outer))
        return self._parts[factor]


def _nest(left: list[int], right: list[int]) -> bool:
    """Whether two factorisations of one size have a common refinement, boundary by boundary."""
    a, b = left[::-1], right[::-1]
    while a and b:
        x, y = a.pop(), b.pop()
        if x % y == 0 and x != y:
            a.append(x // y)
        elif y % x == 0 and x != y:
            b.append(y // x)
        elif x != y:
            return False
    return not a and not b
