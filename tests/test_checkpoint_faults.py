"""Checkpoints that are damaged, forged or of something else are refused, each with an error that says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import Decoder, fill
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import quarot_fx
from quarot_fx.checkpoint.shards import INDEX, read_manifest
from quarot_fx.errors import (
    ArchitectureError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointOptionError,
    CheckpointVersionError,
    CorruptCheckpointError,
    OptionError,
    SaveError,
)

IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch._dynamo.reset()
    folder = tmp_path_factory.mktemp("saved")
    quarot_fx.save(fill(Decoder()), folder, IDS, w_clip=1.0, max_shard_size="1KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def load(folder, model=None, **options):
    return quarot_fx.load(folder, Decoder() if model is None else model, nested_backend="eager", **options)


def a_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["metadata"]["quarot"])
    (folder / INDEX).write_text(json.dumps(index))


def test_it_loads_as_it_is(folder):
    assert load(folder)(IDS).isfinite().all()


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"has no model\.safetensors\.index\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        load(tmp_path / "nowhere")


# -- shards --------------------------------------------------------------------------------------------------


def test_a_missing_shard(folder):
    a_shard(folder).unlink()
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        load(folder)


def test_a_truncated_shard(folder):
    os.truncate(a_shard(folder), a_shard(folder).stat().st_size - 1)
    with pytest.raises(CorruptCheckpointError, match=r"has \d+ bytes, and \d+ were written"):
        load(folder)


def test_a_flipped_bit(folder):
    content = bytearray(a_shard(folder).read_bytes())
    content[-1] ^= 1
    a_shard(folder).write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="its checksum differs"):
        load(folder)


def forge(folder, shard, write):
    """Replace a shard by another file, and let the index say so."""
    import hashlib

    write(shard)
    record = {"size": shard.stat().st_size, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    change_index(folder, lambda quarot: quarot["shards"].update({shard.name: record}))


def test_a_shard_that_is_no_safetensors_file(folder):
    forge(folder, a_shard(folder), lambda shard: shard.write_bytes(b"\x80\x04K\x01." * 9))
    with pytest.raises(CorruptCheckpointError, match="is no safetensors file"):
        load(folder)


def test_a_shard_with_other_tensors(folder):
    tensors = load_file(a_shard(folder))
    forge(folder, a_shard(folder), lambda shard: save_file({}, shard))
    with pytest.raises(CorruptCheckpointError, match=f"has no ({'|'.join(tensors)})"):
        load(folder)


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[..., :-1]], ids=["dtype", "shape"])
def test_a_shard_with_tensors_of_another_layout(folder, change):
    tensors = {name: change(tensor).contiguous() for name, tensor in load_file(a_shard(folder)).items()}
    forge(folder, a_shard(folder), lambda shard: save_file(tensors, shard))
    with pytest.raises(CorruptCheckpointError, match=r"is \w+ \[.*\], not \w+ \["):
        load(folder)


# -- the index -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"metadata": {}}', '{"metadata": {"quarot": []}}', "[" * 10**5]
)
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointFormatError):
        load(folder)


def test_another_version(folder):
    change_index(folder, lambda quarot: quarot.update(format=1))
    with pytest.raises(CheckpointVersionError, match="in format 1, and this quarot_fx reads format 2"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "..", "x.pt", "a\\b.safetensors"]
)
def test_a_shard_outside_of_the_folder(folder, name):
    change_index(folder, lambda quarot: quarot["shards"].update({name: quarot["shards"][a_shard(folder).name]}))
    with pytest.raises(CheckpointFormatError, match="cannot be the name of a shard"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("options"), "has no 'options'"),
        (lambda q: q.update(model_class=1), "model_class is int, not str"),
        (lambda q: q["options"].update(w_bits=99), "its options are none: option w_bits=99"),
        (lambda q: q["options"].update(nothing=1), "its options are none: unknown option 'nothing'"),
        (lambda q: next(iter(q["shards"].values())).update(sha256="0"), "is no SHA-256"),
        (lambda q: next(iter(q["tensors"].values())).update(shard="no.safetensors"), "named and not described"),
        (lambda q: next(iter(q["tensors"].values())).update(shape=[-1]), "shape is -1"),
        (lambda q: next(iter(q["tensors"].values())).update(dtype="object"), "'object' is named"),
        (lambda q: next(iter(q["model"].values())).update(stride=[]), r"sizes and 0 strides"),
        (lambda q: q["codes"][0].update(bits=64), "has codes of 64 bits"),
        (lambda q: q["codes"][0].update(size=10**9), r"is U8 \[.*\] and has to be U8"),
        (lambda q: q["codes"][0].update(scale=q["codes"][0]["packed"]), r"is U8 \[.*\] and has to be BF16"),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be(folder, change, message):
    change_index(folder, change)
    with pytest.raises(CheckpointFormatError, match=message):
        load(folder)


def test_constants_of_another_layout_than_the_graph_has(folder):
    def swap(quarot):
        one, other = (codes for codes in quarot["codes"] if "down" in codes["packed"] or "up" in codes["packed"])
        one["how"], other["how"] = other["how"], one["how"]

    good = shutil.copytree(folder, folder.parent / "good")
    change_index(folder, swap)
    with pytest.raises(CheckpointFormatError, match="has to be"):
        load(folder)(IDS)
    assert load(good)(IDS).isfinite().all(), "the next model of the same kind is not refused for the first one's fault"


# -- the model -----------------------------------------------------------------------------------------------


class Other(Decoder):
    pass


def decoder(change):
    model = Decoder()
    change(model)
    return model


def tie(model):
    model.head.weight = model.table.weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Other(), "it is of Decoder, and the model is a Other"),
        (
            decoder(lambda m: setattr(m, "head", nn.Linear(16, 16, bias=True))),
            r"it has no head\.bias, which the model has",
        ),
        (decoder(lambda m: setattr(m.block, "query", nn.Identity())), r"the model has no block\.query\.weight"),
        (decoder(lambda m: setattr(m, "head", nn.Linear(16, 17, bias=False))), r"its head\.weight is \[16, 16\]"),
    ],
)
def test_another_architecture(folder, model, message):
    with pytest.raises(ArchitectureError, match=message):
        load(folder, model)


def test_a_model_that_has_to_be_given(folder):
    with pytest.raises(ArchitectureError, match="no class of transformers"):
        quarot_fx.load(folder)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"class": "Trainer", "config": {}}, "has no model 'Trainer'"),
        ({"class": "os.system", "config": {}}, "has no model"),
        ({"class": None, "config": {}}, "has no model None"),
        ({"class": "LlamaForCausalLM", "config": {"model_type": "none"}}, "has no config for 'none'"),
        ({"class": "LlamaForCausalLM", "config": {"model_type": "llama", "hidden_size": "x"}}, "cannot be built"),
        ({"class": "LlamaForCausalLM", "config": {"model_type": "llama"}, "attn_implementation": "evil/kernel"},
         "attn_implementation='evil/kernel' is none of"),
    ],
)  # fmt: skip
def test_a_model_of_transformers_that_there_is_not(folder, description, message):
    change_index(folder, lambda quarot: quarot.update(transformers=description))
    with pytest.raises(ArchitectureError, match=message):
        quarot_fx.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 8}, "made with w_bits=4, not 8"),
        ({"seed": 1}, "made with seed=0, not 1"),
        ({"check": True}, "check=True needs the original weights"),
        ({"free_originals": True}, "free_originals=True needs the original weights"),
    ],
)
def test_options_that_contradict(folder, options, message):
    with pytest.raises(CheckpointOptionError, match=message):
        load(folder, **options)


# -- saving --------------------------------------------------------------------------------------------------


def test_a_folder_with_other_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SaveError, match=r"weights of another kind: model\.safetensors"):
        quarot_fx.save(Decoder().eval(), tmp_path, IDS)


def test_a_folder_with_the_index_of_other_weights(tmp_path):
    (tmp_path / INDEX).write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(SaveError, match=INDEX):
        quarot_fx.save(Decoder().eval(), tmp_path, IDS)


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="it is a file"):
        quarot_fx.save(Decoder().eval(), tmp_path / "file", IDS)


def test_inputs_are_missing(tmp_path):
    with pytest.raises(SaveError, match="Give example inputs"):
        quarot_fx.save(Decoder().eval(), tmp_path)


def test_options_of_the_run_are_not_saved(tmp_path):
    with pytest.raises(OptionError, match="kernels='none': changes no weight"):
        quarot_fx.save(Decoder().eval(), tmp_path, IDS, kernels="none")


@pytest.mark.parametrize("size", ["0", "many", "-3", "1TB"])
def test_a_size_that_is_none(tmp_path, size):
    with pytest.raises(OptionError, match="max_shard_size"):
        quarot_fx.save(Decoder().eval(), tmp_path, IDS, max_shard_size=size)


def test_a_tensor_without_a_name(tmp_path):
    class Hidden(Decoder):
        def __init__(self):
            super().__init__()
            self.matrix = torch.ones(16, 16)

        def forward(self, ids):
            return self.head(F.linear(self.embedding(ids), self.matrix).relu())

    with pytest.raises(SaveError, match=r"neither a parameter nor a buffer of it: .*matrix"):
        quarot_fx.save(Hidden().eval(), tmp_path, IDS)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch, quarot_fx
from graphs import Decoder, fill
from quarot_fx.checkpoint import {module}

original = {module}.{function}
def slow(*arguments, **keywords):
    result = original(*arguments, **keywords)
    print("written", flush=True)
    time.sleep(60)
    return result

{module}.{function} = slow
model = fill(Decoder())
with torch.no_grad():
    model.head.weight.mul_(2)
quarot_fx.save(model, sys.argv[1], torch.arange(10).reshape(2, 5), w_clip=1.0, max_shard_size="1KB")
"""


@pytest.mark.parametrize(("module", "function"), [("shards", "save_file"), ("shards", "_sync")])
def test_a_save_that_is_killed_leaves_the_checkpoint_from_before(folder, module, function):
    before, expected = read_manifest(folder), load(folder)(IDS)
    script = KILLED.format(module=module, function=function)
    command = [sys.executable, "-c", script, str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert len(list(folder.iterdir())) > len(before.shards) + 1, "it was killed while it wrote"
    assert read_manifest(folder) == before
    torch._dynamo.reset()
    assert torch.equal(load(folder)(IDS), expected)
    quarot_fx.save(load(folder), folder, IDS, w_clip=1.0)
    assert {path.name for path in folder.iterdir()} == {INDEX, *read_manifest(folder).shards}, "remains are removed"


# -- learned rotations -----------------------------------------------------------------------------


@pytest.fixture
def with_learned(tmp_path):
    """A checkpoint with learned rotations."""
    model = fill(Decoder())
    tokens = torch.arange(24).view(2, 12) % 16
    learned = quarot_fx.learn_rotations(model, tokens, learning={"steps": 1, "batch": 2})
    quarot_fx.save(model, tmp_path / "learned", tokens, learned_rotations=learned)
    return tmp_path / "learned"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("learned"), "its options name the rotations 'learned-.*', and it holds None"),
        (
            lambda q: q["options"].update(learned_rotations="/etc"),
            "its options name the rotations '/etc', and",
        ),
        (lambda q: q["learned"][0].update(absorbed_by=["x"]), "its options name the rotations 'learned-.*', and it h"),
        (lambda q: q["learned"][0].update(rotation="learned-8-0"), "the matrix of learned-8-0 is that of learned-16-"),
        (lambda q: q["learned"][0].update(tensor="none"), "'none' is named and not described"),
        (lambda q: q["learned"][0].update(tensor=q["codes"][0]["packed"]), r"is U8 \[.*\] and has to be F64"),
        (lambda q: q["learned"][0].update(absorbed_by=[1]), "absorbed_by is int, not str"),
    ],
)
def test_learned_rotations_that_cannot_be(with_learned, change, message):
    change_index(with_learned, change)
    with pytest.raises(CheckpointFormatError, match=message):
        load(with_learned)


def test_a_learned_matrix_that_is_no_rotation(with_learned):
    (shard,) = with_learned.glob("*.safetensors")
    tensors = {name: 2 * one if name.startswith("learned") else one for name, one in load_file(shard).items()}
    forge(with_learned, shard, lambda shard: save_file(tensors, shard))
    with pytest.raises(CheckpointFormatError, match=r"is no rotation: .* differs from the identity"):
        load(with_learned)


# -- balances of keys ------------------------------------------------------------------------------


@pytest.fixture
def with_balances(tmp_path):
    """A checkpoint whose keys are balanced."""
    model = fill(Decoder())
    found = quarot_fx.calibrate(model, torch.arange(24).view(2, 12) % 16, w_rounding="nearest", key_balance="search")
    quarot_fx.save(model, tmp_path / "balanced", IDS, **found.options)
    return tmp_path / "balanced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("balances"), "its options name the balances 'balances-.*', and it holds None"),
        (lambda q: q["options"].update(key_balance="/etc"), "its options name the balances '/etc', and it holds"),
        (lambda q: q["balances"][0].update(where="x"), "its options name the balances 'balances-.*', and it holds 'b"),
        (lambda q: q["balances"][0].update(balance="balance-2x4-0"), "of balance-2x4-0 are those of balance-2x8-"),
        (lambda q: q["balances"][0].update(tensor="none"), "'none' is named and not described"),
        (lambda q: q["balances"][0].update(tensor=q["codes"][0]["packed"]), r"is U8 \[.*\] and has to be F64"),
        (lambda q: q["balances"][0].update(where=1), "where is int, not str"),
    ],
)
def test_balances_that_cannot_be(with_balances, change, message):
    change_index(with_balances, change)
    with pytest.raises(CheckpointFormatError, match=message):
        load(with_balances)


@pytest.mark.parametrize(
    ("change", "message"), [(lambda x: -x, "one is not positive definite"), (lambda x: 2 * x, "are those of balance-")]
)
def test_matrices_that_balance_nothing_or_otherwise(with_balances, change, message):
    (shard,) = with_balances.glob("*.safetensors")
    tensors = {name: change(one) if name.startswith("balance") else one for name, one in load_file(shard).items()}
    forge(with_balances, shard, lambda shard: save_file(tensors, shard))
    with pytest.raises(CheckpointFormatError, match=message):
        load(with_balances)


def test_matrices_that_are_missing(with_balances):
    (shard,) = with_balances.glob("*.safetensors")
    tensors = {name: one for name, one in load_file(shard).items() if not name.startswith("balance")}
    forge(with_balances, shard, lambda shard: save_file(tensors, shard))
    with pytest.raises(CorruptCheckpointError, match="has no balance-"):
        load(with_balances)
