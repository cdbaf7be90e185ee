"""The error of a checkpoint that says what none of ours says."""

from __future__ import annotations

from quarot_fx.errors import CheckpointFormatError


def damaged(folder: str, reason: str) -> CheckpointFormatError:
    """Return the error of a checkpoint in a folder, of which something is not what was written, for this reason."""
    remedy = "It is damaged, or something else than quarot_fx.save wrote it."
    return CheckpointFormatError(folder=folder, reason=reason, remedy=remedy)
