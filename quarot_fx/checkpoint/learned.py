"""The matrices of learned rotations in a checkpoint: its options only name them, and graphs with a cache need some."""

from __future__ import annotations

from quarot_fx.checkpoint.damage import damaged
from quarot_fx.checkpoint.manifest import Learned, Manifest
from quarot_fx.checkpoint.shards import ShardReader, ShardWriter
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import NotOrthogonalError
from quarot_fx.learning.rotations import LearnedRotation, LearnedRotations, known_rotations
from quarot_fx.rotation import Rotation


def write_learned(config: QuarotConfig, writer: ShardWriter) -> tuple[Learned, ...]:
    """Write the rotations that a config names, if it does."""
    if config.learned_rotations is None:
        return ()
    return tuple(
        Learned(str(one.rotation), one.absorbed_by, writer.add(str(one.rotation), one.rotation.matrix()))
        for one in known_rotations(config.learned_rotations)
    )


def read_learned(manifest: Manifest, reader: ShardReader, folder: str) -> None:
    """Make the rotations of a checkpoint known to the process, by the name that its options have for them.

    Raises:
        CheckpointFormatError: a matrix is no rotation, or another one than it is called; or the options name others.
    """
    learned = []
    for one in manifest.learned:
        try:
            rotation = Rotation.of_matrix(reader.read(one.tensor))
        except NotOrthogonalError as error:
            raise damaged(folder, f"{one.rotation} is no rotation: {error}") from error
        if str(rotation) != one.rotation:
            raise damaged(folder, f"the matrix of {one.rotation} is that of {rotation}")
        learned.append(LearnedRotation(rotation, one.absorbed_by))
    name, named = LearnedRotations(learned).name if learned else None, manifest.options.get("learned_rotations")
    if name != named:
        raise damaged(folder, f"its options name the rotations {named!r}, and it holds {name!r}")
