"""Models that tests share: tiny ones with random weights, and SmolLM2-135M where its package is installed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from quarot_fx.cli.models import load_model
from quarot_fx.errors import MissingExtraError

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,  # 44 * 4, so that a Hadamard of an order that is no power of 2 is needed
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each architecture needs besides, or calls by a name of its own.
SPECIFICS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 32},  # twice hidden / heads
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "olmo2": {},
    "cohere": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "stablelm": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 176, "word_embed_proj_dim": 64},
    "gpt2": {"n_inner": 176},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny_model(model_type: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode. No gain is 1 and no bias 0: those would hide mistakes."""
    settings = {**TINY, **SPECIFICS[model_type], **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.2 * noise
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def random_token_ids(batch: int = 1, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length] that every tiny model has; none is a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TINY["vocab_size"], (batch, length), generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose 256 tokens are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_tiny_model(folder: Path, *, with_tokenizer: bool = True) -> Path:
    """Write a tiny Llama of one layer, and its tokenizer, as a user would have them."""
    tiny_model("llama", num_hidden_layers=1).save_pretrained(folder)
    if with_tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def smollm2() -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, loaded once; skips the test where it is not installed."""
    try:
        return load_model("smollm2")
    except MissingExtraError as error:
        pytest.skip(str(error))
