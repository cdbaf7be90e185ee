"""Learned rotations in a folder: round trips, and files that are not what was written."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from graphs import Decoder, fill
from safetensors.torch import load_file, save_file

import quarot_fx
from quarot_fx.config import QuarotConfig
from quarot_fx.errors import LearnedRotationsFileError, NotOrthogonalError
from quarot_fx.learning import rotations as rotations_module
from quarot_fx.learning.rotations import LearnedRotation, LearnedRotations
from quarot_fx.learning.storage import INDEX, MATRICES
from quarot_fx.rotation import Rotation

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
STREAM, VALUES = ("embedding.weight axis 1 inner 1",), ("block.value.weight axis 0 inner 1",)


@pytest.fixture
def folder(tmp_path):
    """A set in a folder, which the process has forgotten."""
    learned = LearnedRotations(
        [
            LearnedRotation(Rotation.of_matrix(Rotation("random", 8, 1).matrix()), STREAM),
            LearnedRotation(Rotation.of_matrix(Rotation("random", 4, 2).matrix()), VALUES),
        ],
        {"loss": "divergence", "steps": 2},
        [0.25, 0.125],
        1.5,
    )
    learned.save(tmp_path / "learned")
    return tmp_path / "learned"


def rewrite_index(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **changes}))


def rewrite_matrices(folder, change):
    """Change the matrices, and have the index say so."""
    matrices = load_file(folder / MATRICES)
    save_file(change(matrices), folder / MATRICES)
    rewrite_index(folder, sha256=hashlib.sha256((folder / MATRICES).read_bytes()).hexdigest())


def test_round_trip(folder):
    loaded = LearnedRotations.load(folder)
    assert (loaded.losses, loaded.seconds, loaded.options["steps"]) == ((0.25, 0.125), 1.5, 2)
    assert [one.absorbed_by for one in loaded] == [STREAM, VALUES]
    assert torch.equal(loaded.rotations[0].rotation.matrix(), Rotation("random", 8, 1).matrix())
    loaded.save(folder)  # over itself
    assert LearnedRotations.load(folder) == loaded
    assert {path.name for path in folder.iterdir()} == {INDEX, MATRICES}


def test_a_folder_is_as_good_as_what_it_holds(tmp_path, monkeypatch):
    model = fill(Decoder())
    tokens = torch.arange(24).view(2, 12) % 16
    learned = quarot_fx.learn_rotations(model, tokens, learning={"steps": 1, "batch": 2})
    learned.save(tmp_path)
    config = QuarotConfig(learned_rotations=learned)
    expected = quarot_fx.rewrite(model, tokens, learned_rotations=learned)(tokens)[0]
    monkeypatch.setattr(rotations_module, "_KNOWN", {})  # as in another process
    monkeypatch.setattr("quarot_fx.rotation._GIVEN", {})
    for folder in (tmp_path, str(tmp_path)):
        assert QuarotConfig(learned_rotations=folder) == config
        assert torch.equal(quarot_fx.rewrite(model, tokens, learned_rotations=folder)(tokens)[0], expected)
    assert QuarotConfig.from_options(config.as_options()) == config
    json.dumps(config.as_options())
    assert hash(config) != hash(QuarotConfig())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / INDEX).unlink(),
            f"there is no {INDEX}. Give what quarot_fx.learn_rotations returned",
        ),
        (lambda folder: (folder / MATRICES).unlink(), f"it has no {MATRICES}. Copy both files"),
        (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} is no JSON"),
        (lambda folder: (folder / INDEX).write_text("[" * 100_000), f"{INDEX} is no JSON"),
        (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX} is a list"),
        (lambda folder: rewrite_index(folder, format=2), "it is in format 2, and this quarot_fx reads 1"),
        (lambda folder: rewrite_index(folder, name="learned-0"), "it is called 'learned-0', and its content"),
        (lambda folder: rewrite_index(folder, rotations=[{}]), f"{INDEX} is none: KeyError"),
        (lambda folder: rewrite_index(folder, rotations=3), f"{INDEX} is none: TypeError"),
        (lambda folder: rewrite_index(folder, losses=3), f"{INDEX} is none: TypeError"),
        (lambda folder: rewrite_index(folder, losses=["low"]), f"{INDEX} is none: ValueError"),
        (lambda folder: rewrite_index(folder, seconds="long"), f"{INDEX} is none: ValueError"),
        (lambda folder: (folder / MATRICES).write_bytes((folder / MATRICES).read_bytes()[:-1]), "its checksum differs"),
        (lambda folder: rewrite_matrices(folder, lambda found: dict(list(found.items())[:1])), "is none: KeyError"),
        (
            lambda folder: rewrite_matrices(folder, lambda found: {name: -q for name, q in found.items()}),
            "is none: ValueError: the matrix of learned-",
        ),
    ],
)
def test_what_is_not_what_was_written(folder, spoil, message):
    spoil(folder)
    with pytest.raises(LearnedRotationsFileError) as caught:
        QuarotConfig(learned_rotations=folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_matrix_that_is_no_rotation(folder):
    rewrite_matrices(folder, lambda found: {name: 1.001 * q for name, q in found.items()})
    with pytest.raises(NotOrthogonalError, match=r"differs from the identity by 2.0e-03"):
        LearnedRotations.load(folder)


def test_what_absorbs_a_rotation_is_text(folder):
    index = json.loads((folder / INDEX).read_text())
    for absorbed_by in ("text", [1], None):
        one = {**index["rotations"][0], "absorbed_by": absorbed_by}
        rewrite_index(folder, rotations=[one])
        with pytest.raises(LearnedRotationsFileError, match=r"what absorbs learned-8-.* is"):
            LearnedRotations.load(folder)


def test_no_file_that_is_read_can_run_code(folder):
    (folder / MATRICES).write_bytes(b"\x80\x04not safetensors")
    rewrite_index(folder, sha256=hashlib.sha256((folder / MATRICES).read_bytes()).hexdigest())
    with pytest.raises(LearnedRotationsFileError, match=f"{MATRICES} cannot be read"):
        LearnedRotations.load(folder)
