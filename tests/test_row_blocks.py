"""Constants that are computed a few rows at a time: the same values, in less memory."""

from __future__ import annotations

import pytest
import torch
from graphs import Decoder, Lambda, fill, linear, rms_norm, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quarot_fx
from quarot_fx import row_blocks
from quarot_fx.passes import fold_constants
from quarot_fx.row_blocks import computed_by_rows

IDS = torch.arange(10).reshape(2, 5)
BLOCK = 48  # three rows of 16

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class LargestFloat64(TorchDispatchMode):
    """Elements of the largest float64 tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64 and not one._is_view():
                self.elements = max(self.elements, one.numel())
        return result


def constants(model, inputs, **options):
    program = quarot_fx.rewrite(fill(model), inputs, **{"w_clip": 1.0, "kernels": "none", **options})
    return dict(program.named_buffers())


@pytest.mark.parametrize("options", [{}, {"w_sym": False, "w_group": 4}, {"w_bits": 16}, {"rotation": "random"}])
def test_values_are_the_same(monkeypatch, options):
    whole = constants(Decoder(), IDS, **options)
    monkeypatch.setattr(row_blocks, "BLOCK", BLOCK)
    blocks = constants(Decoder(), IDS, **options)
    assert whole.keys() == blocks.keys()
    assert len(whole) > 3
    for name, expected in whole.items():
        torch.testing.assert_close(blocks[name], expected, rtol=1e-6, atol=1e-7)
        assert blocks[name].is_contiguous()


def test_no_weight_is_whole_in_float64(monkeypatch):
    """The weight is rotated on its input side only, with a gain."""
    monkeypatch.setattr(row_blocks, "BLOCK", BLOCK)
    largest, compute = LargestFloat64(), fold_constants.evaluate

    def observed(*arguments):
        with largest:
            return compute(*arguments)

    monkeypatch.setattr(fold_constants, "evaluate", observed)
    model = Lambda(lambda m, x: m.a(rms_norm(x, m.g)).relu(), a=linear(24), g=16)
    constants(model, tokens(), disabled_passes=("place-rotations", "rotate"))
    assert 16 <= largest.elements <= BLOCK


def test_what_mixes_rows_is_computed_whole(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", BLOCK)
    found = []

    def look(node):
        steps = computed_by_rows(node)
        found.append(([str(one.target) for one in steps], str(node.target), node.args))
        return steps

    monkeypatch.setattr("quarot_fx.float64.computed_by_rows", look)
    constants(Decoder(), IDS)
    rotations = [(bool(steps), args[2]) for steps, target, args in found if target == "quarot.rotate.default"]
    assert (True, 1) in rotations
    assert (False, 0) in rotations
    assert (True, 0) not in rotations
    assert any(steps[:1] == ["quarot.rotate.default"] for steps, *_ in found), "after one over rows, by rows again"
    quantized = [steps for steps, target, _ in found if target == "quarot.quantize_weight.default"]
    assert ["aten.mul.Tensor", "aten.to.dtype", "quarot.rotate.default", "quarot.quantize_weight.default"] in quantized
