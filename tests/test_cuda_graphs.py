"""Decoding by CUDA graphs: constants and caches stay where they are, and replays give what running the graph gives."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from quarot_fx.float64 import relative_difference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
    pytest.mark.usefixtures("fresh_dynamo"),
]
PROMPT, STEPS = 7, 6


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().cuda()


def decode(compiled, config):
    """Return the logits of a prompt and of every token after it, each step with a cache of the user's."""
    cache = StaticCache(config=config, max_cache_len=32)
    head = config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, head, torch.float32, torch.device("cuda"))
    ids = torch.randint(config.vocab_size, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1)).cuda()
    logits = []
    for chunk in ids.split([PROMPT] + [1] * STEPS, dim=1):
        torch.compiler.cudagraph_mark_step_begin()
        logits.append(compiled(input_ids=chunk.clone(), past_key_values=cache).logits.clone())
    return logits


@pytest.mark.parametrize("options", [{}, {"kv_bits": 16}, {"w_bits": 8, "a_bits": 8, "a_sym": False}])
def test_replays_give_what_the_graph_gives(options):
    decoder = model()
    eager = torch.compile(decoder, backend="quarot", options={"nested_backend": "eager", **options})
    expected = decode(eager, decoder.config)
    torch.compiler.reset()
    recorded = torch.compile(decoder, backend="quarot", options={"mode": "reduce-overhead", **options})
    for _ in range(2):  # the second time, everything is replayed
        assert relative_difference(decode(recorded, decoder.config), expected) < 0.05
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_another_models_weights_are_not_those_of_the_recording():
    """One compiled graph serves every model whose guards pass; a recording reads the constants it was made with."""
    one, other = model(), model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    function = torch.compile(lambda m, **inputs: m(**inputs), backend="quarot", options={"mode": "reduce-overhead"})
    found = [decode(lambda m=m, **inputs: function(m, **inputs), m.config) for m in (one, other, one)]
    torch.compiler.reset()
    eager = torch.compile(lambda m, **inputs: m(**inputs), backend="quarot", options={"nested_backend": "eager"})
    for logits, m in zip(found, (one, other, one), strict=True):
        expected = decode(lambda m=m, **inputs: eager(m, **inputs), m.config)
        assert relative_difference(logits, expected) < 0.05
