"""Ways of calling a model: padding, positions, embeddings instead of ids, some logits, several outputs, modes."""

from __future__ import annotations

import pytest
import torch
from architectures import compile_model
from models import random_token_ids, tiny_model

from quarot_fx.float64 import relative_difference

BATCH, LENGTH = 3, 10
IDS = random_token_ids(BATCH, LENGTH)
LENGTHS = torch.tensor([10, 7, 4])
RIGHT = (torch.arange(LENGTH) < LENGTHS[:, None]).long()
LEFT = RIGHT.flip(1)
POSITIONS = (LEFT.cumsum(1) - 1).clamp(min=0)
EMBEDDINGS = torch.randn(BATCH, LENGTH, 64, generator=torch.Generator().manual_seed(0))

CALLS = {
    "right_padding": {"input_ids": IDS, "attention_mask": RIGHT},
    "left_padding": {"input_ids": IDS, "attention_mask": LEFT},
    "left_padding_with_positions": {"input_ids": IDS, "attention_mask": LEFT, "position_ids": POSITIONS},
    "position_ids": {"input_ids": IDS, "position_ids": torch.arange(LENGTH).flip(0).expand(BATCH, -1)},
    "inputs_embeds": {"inputs_embeds": EMBEDDINGS},
    "last_logits": {"input_ids": IDS, "logits_to_keep": 1},
    "some_logits": {"input_ids": IDS, "logits_to_keep": torch.tensor([0, 4, 7])},
    "hidden_states": {"input_ids": IDS, "output_hidden_states": True},
}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def tensors(output):
    """All floating-point tensors that a model returned, logits first."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output.to_tuple()) if leaf is not None]


def assert_as_eager(model, inputs, tolerance=1e-4):
    expected = tensors(model(**inputs, use_cache=False))
    rotated = tensors(compile_model(model, stop_after="rotate")(**inputs, use_cache=False))
    assert [t.shape for t in rotated] == [t.shape for t in expected]
    assert relative_difference(rotated, expected) < tolerance


def assert_four_bits_work(model, inputs):
    expected = tensors(model(**inputs, use_cache=False))
    quantized = tensors(compile_model(model)(**inputs, use_cache=False))
    assert all(tensor.isfinite().all() for tensor in quantized)
    assert 1e-3 < relative_difference(quantized[:1], expected[:1]) < 1


@pytest.mark.parametrize("call", CALLS)
def test_rotation_alone_changes_nothing(model, call):
    assert_as_eager(model, CALLS[call])


@pytest.mark.parametrize("call", ["left_padding", "inputs_embeds", "hidden_states"])
def test_four_bits(model, call):
    assert_four_bits_work(model, CALLS[call])


@pytest.mark.slow
@pytest.mark.parametrize("call", [call for call in CALLS if call != "inputs_embeds"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_other_models(name, call):
    settings = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = tiny_model(name, **settings)
    assert_as_eager(model, CALLS[call])
    assert_four_bits_work(model, CALLS[call])


def test_attention_weights_are_returned():
    model = tiny_model("llama", attn_implementation="eager")
    inputs = {"input_ids": IDS, "output_attentions": True}
    assert_as_eager(model, inputs)
    assert_four_bits_work(model, inputs)


def test_padding_does_not_change_other_tokens(model):
    """In 4 bits, too: a token is rounded by itself, and what is masked counts for nothing."""
    double = tiny_model("llama").double()
    compiled = compile_model(double, dynamic=False)
    padded = compiled(IDS, attention_mask=RIGHT, use_cache=False).logits
    for row, length in enumerate(LENGTHS):
        alone = compiled(IDS[row : row + 1, :length], use_cache=False).logits
        assert relative_difference([padded[row : row + 1, :length]], [alone]) < 1e-6


def test_inference_mode_around_the_call(model):
    compiled = compile_model(model, stop_after="rotate")
    with torch.inference_mode():
        inside = compiled(IDS, use_cache=False).logits
    outside = compiled(IDS, use_cache=False).logits
    assert inside.is_inference()
    assert not outside.is_inference()
    assert relative_difference([inside, outside], [model(IDS, use_cache=False).logits] * 2) < 1e-4


def test_inference_mode_first_then_weights_change(model):
    """Constants that are made in inference mode serve calls outside of it, and are made anew like any other."""
    changing = tiny_model("llama", seed=1)
    compiled = compile_model(changing, stop_after="rotate")
    with torch.inference_mode():
        compiled(IDS, use_cache=False)
    changing.model.layers[0].mlp.down_proj.weight.mul_(2)
    with torch.inference_mode():
        result = compiled(IDS, use_cache=False).logits
    assert relative_difference([result], [changing(IDS, use_cache=False).logits]) < 1e-4


def test_grad_mode_around_the_call(model):
    with torch.enable_grad():
        result = compile_model(model, stop_after="rotate")(IDS, use_cache=False).logits
    assert not result.requires_grad
    assert relative_difference([result], [model(IDS, use_cache=False).logits]) < 1e-4
