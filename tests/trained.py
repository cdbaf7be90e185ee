"""A small trained model, texts that it wrote, and how far a quantised model's predictions are from its own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import quarot_fx

BABYLLAMA = Path(__file__).parents[2] / "shared" / "models" / "babyllama-tok105"


@functools.cache
def babyllama() -> PreTrainedModel:
    """A Llama of 5 layers and 105 tokens that was trained on stories; skips the test where it is not there."""
    if not BABYLLAMA.is_dir():
        pytest.skip(f"{BABYLLAMA.name} is not there")
    return AutoModelForCausalLM.from_pretrained(BABYLLAMA, dtype=torch.float32).eval()


@functools.cache
def stories(count: int, length: int) -> torch.Tensor:
    """Token ids [count, length] that :func:`babyllama` wrote."""
    model = babyllama()
    torch.manual_seed(0)
    begin = torch.full((count, 1), model.config.bos_token_id)
    return model.generate(begin, do_sample=True, max_length=length, min_length=length, pad_token_id=0)


def divergence(model: nn.Module, tokens: torch.Tensor, **options: Any) -> float:
    """Return the mean Kullback-Leibler divergence of the quantised model's predictions from the float model's."""
    inputs = {"input_ids": tokens, "use_cache": False}
    expected = model(**inputs).logits.log_softmax(-1)
    actual = quarot_fx.rewrite(model, inputs, **options)(tokens)[0].log_softmax(-1)
    return nn.functional.kl_div(actual, expected, log_target=True, reduction="none").sum(-1).mean().item()
