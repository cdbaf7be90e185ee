"""Models in half precision, and autocast around and inside of them."""

from __future__ import annotations

import pytest
import torch
from architectures import compile_model
from graphs import Decoder, fill
from models import random_token_ids, tiny_model
from torch import nn

import quarot_fx
from quarot_fx.float64 import relative_difference

IDS = random_token_ids(2, 10)
HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoff

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rotated_model_is_as_near_to_the_exact_one_as_eager_is(name, dtype):
    model = tiny_model(name).to(dtype)
    exact = tiny_model(name).to(dtype).double()(IDS, use_cache=False).logits
    eager = model(IDS, use_cache=False).logits
    rotated = compile_model(model, stop_after="rotate")(IDS, use_cache=False).logits
    assert rotated.dtype == dtype
    error = relative_difference([rotated], [exact])
    assert error < 2 * relative_difference([eager], [exact])
    assert error < 10 * HALVES[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stream_keeps_its_dtype(dtype):
    """Every linear layer reads what it reads in eager; norms alone are wider."""
    gm = quarot_fx.rewrite(tiny_model("llama").to(dtype), {"input_ids": IDS, "use_cache": False})
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert {node.args[0].meta["val"].dtype for node in linears} == {dtype}
    assert {node.meta["val"].dtype for node in linears} == {dtype}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_four_bits(dtype):
    model = tiny_model("llama").to(dtype)
    logits = compile_model(model)(IDS, use_cache=False).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


class Autocast(nn.Module):
    """A decoder whose block runs under autocast."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.decoder, self.enabled = Decoder(), enabled

    def forward(self, ids):
        x = self.decoder.embedding(ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            x = self.decoder.block(x)
        return self.decoder.head(self.decoder.norm(x.float()))


def test_autocast_inside_of_the_model():
    model = fill(Autocast())
    exact = fill(Autocast(enabled=False))(IDS % 16)
    expected = model(IDS % 16)
    result = compile_model(model, stop_after="rotate")(IDS % 16)
    assert result.dtype == expected.dtype
    assert relative_difference([result], [exact]) < 2 * relative_difference([expected], [exact]) + 2.0**-8


def test_autocast_around_the_call():
    model = tiny_model("llama")
    exact = model(IDS, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS, use_cache=False).logits
        result = compile_model(model, stop_after="rotate")(IDS, use_cache=False).logits
        quantized = compile_model(model)(IDS, use_cache=False).logits
    assert result.dtype == expected.dtype
    assert relative_difference([result], [exact]) < 2 * relative_difference([expected], [exact])
    assert quantized.isfinite().all()


def test_all_is_quantised_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        report = quarot_fx.rewrite(tiny_model("llama"), {"input_ids": IDS, "use_cache": False}).quarot
    kept = {record.parameter for record in report.linears if (record.w_bits, record.a_bits) != (4, 4)}
    assert kept == {"lm_head.weight"}
    assert {record.rotated for record in report.linears} == {"free", "online"}
    assert [record.bits for record in report.caches] == [4] * 4
