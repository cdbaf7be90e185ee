"""How a typed error gets from the backend to the caller, through Dynamo, which wraps what it does not know."""

from __future__ import annotations

from torch._dynamo.exc import ShortenTraceback
from torch._guards import TracingContext

from quarot_fx.errors import QuarotError


def refusal(error: QuarotError) -> Exception:
    """Return what to raise for ``error``: itself, or where Dynamo is compiling, what Dynamo turns into it."""
    return error if TracingContext.try_get() is None else _Refusal(error)


class _Refusal(ShortenTraceback):
    """An error in Dynamo's own clothes: it lets such a one through, and asks it what to raise in the user's frame.

    No graph is returned for the failed one, so Dynamo keeps none: it looks neither at the content of a parameter nor
    at options that a checkpoint brings, and would refuse another model of the same class for the first one's fault.
    """

    def __init__(self, error: QuarotError) -> None:
        super().__init__(str(error), first_useful_frame=None)
        self._error = error

    def remove_dynamo_frames(self) -> Exception:  # type: ignore[override]
        return self._error.with_traceback(None)
