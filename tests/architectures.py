"""Decoder architectures: two layers of each, and the rotation plan that one would make for it by hand.

All have 64 channels, 4 heads and, where they group heads, 2 heads of keys and values. Options that change the graph
(multipliers, soft caps, biases, norms of queries and keys, windows) are set to values under which a mistake shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import tiny_model
from transformers import PreTrainedModel

LAYERS = 2
HEAD = "lm_head.weight"
TIED = "model.embed_tokens.weight"  # an output head that is the embedding

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GATE_UP = "mlp.gate_proj mlp.up_proj"
ONCE_PER_LAYER = ("query", "key", "self_attn.o_proj", "mlp.down_proj")  # QuaRot's plan for Llama
# A gain on what is added to the residual stream keeps that stream in its own basis. So all that reads it pays.
WITH_POST_NORMS = (QKV, GATE_UP, *ONCE_PER_LAYER)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: what transformers calls it.
        settings: of its config, besides the sizes that all rows share.
        online: what reads the result of an online transform, once in every layer: layers by their name in the
            block, all readers of one transform together, and ``query`` and ``key`` for what attention reads.
        free: weights that are rotated at no cost when the model runs; of a layer, and the output head.
        not_rotated: weights that are not rotated.
        keys, values: how they come to be rotated.
        declined: pass -> places that it leaves as they are.
        barriers: operators without a rule.
        unquantized: weights that 4 bits are not for: output heads and routers.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    online: tuple[str, ...] = ONCE_PER_LAYER
    free: int = 5 * LAYERS + 1
    not_rotated: int = 0
    keys: str = "online"
    values: str = "free"
    declined: Mapping[str, int] = field(default_factory=dict)
    barriers: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = (HEAD,)

    def build(self) -> PreTrainedModel:
        """A float32 model in evaluation mode with random weights, gains and biases; the same every time."""
        return tiny_model(self.model_type, **self.settings)


def compile_model(model: PreTrainedModel, *, dynamic: bool | None = None, **options: Any) -> Any:
    """The model through the backend, where a graph break is an error; options are those of the backend."""
    options = {"nested_backend": "eager", **options}
    return torch.compile(model, backend="quarot", fullgraph=True, dynamic=dynamic, options=options)


ARCHITECTURES = (
    Architecture("llama"),
    Architecture("mistral", {"sliding_window": 8}),
    Architecture("qwen2"),  # q, k and v have biases
    Architecture(
        "qwen3",
        {"head_dim": 32},
        declined={"fold-gains": 2 * LAYERS},  # of queries and keys: RoPE is between them and their readers
    ),
    Architecture("gemma", {"head_dim": 32}, unquantized=(TIED,)),  # gains are 1 + w, the embedding is scaled
    Architecture(
        "gemma2",
        {
            "attn_implementation": "eager",  # the fused operator has no soft cap
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
        },
        online=WITH_POST_NORMS,
        free=0,
        not_rotated=1,
        declined={"fold-gains": 2 * LAYERS},  # of the norms after attention and after the MLP
        unquantized=(TIED,),
    ),
    Architecture(
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        online=WITH_POST_NORMS,
        free=0,
        not_rotated=1,
        declined={"fold-gains": 4 * LAYERS},  # as Gemma 2, and of queries and keys
        unquantized=(TIED,),
    ),
    Architecture(  # attention and MLP in parallel behind one LayerNorm, partial rotary
        "phi", {"num_key_value_heads": 2}, online=("query", "key", "self_attn.dense", "mlp.fc2"), free=4 * LAYERS + 1
    ),
    Architecture("phi3", free=2 * LAYERS + 1),  # q, k, v in one weight; gate and up in another
    Architecture(
        "olmo2",
        online=WITH_POST_NORMS,
        free=0,
        not_rotated=1,
        declined={"fold-gains": 4 * LAYERS},  # norms of queries and keys span all heads
    ),
    Architecture(  # attention and MLP in parallel, a LayerNorm with a gain per head on queries and keys
        "cohere",
        {"use_qk_norm": True, "logit_scale": 0.5},
        declined={"fold-means": 2 * LAYERS},
        unquantized=(TIED,),
    ),
    Architecture(
        "granite",
        {
            "attention_bias": True,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "mlp_bias": True,
            "residual_multiplier": 0.5,
        },
    ),
    Architecture("stablelm", {"use_qkv_bias": True}),  # LayerNorm, a quarter rotary
    Architecture(  # attention and MLP in parallel, each behind its own LayerNorm
        "gpt_neox",
        online=("query", "key", "attention.dense", "mlp.dense_4h_to_h"),
        free=2 * LAYERS + 1,
    ),
    Architecture(  # positions are learned and added: no RoPE, so that weights absorb the rotation of queries and keys
        "opt",
        {"ffn_dim": 176},
        online=("self_attn.out_proj", "fc2"),
        free=4 * LAYERS + 1,
        keys="free",
        unquantized=("model.decoder.embed_tokens.weight",),
    ),
    Architecture(  # likewise, and weights are stored [in, out]
        "gpt2",
        {"n_inner": 176},
        online=("attn.c_proj", "mlp.c_proj"),
        free=2 * LAYERS + 1,
        keys="free",
        unquantized=("transformer.wte.weight",),
    ),
    Architecture(  # routers are rotated with what they read, and not quantised
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        online=("query", "key", "self_attn.o_proj", "mlp.experts.down_proj"),
        unquantized=(HEAD, "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
    ),
)

# One of each kind of graph: plain, with soft caps and norms after each part, with LayerNorm, with packed weights,
# with transposed ones, with experts. What is asked of a kind, and not of a plan, is slow to be asked of the others.
KINDS = {"llama", "gemma2", "cohere", "phi3", "gpt2", "mixtral"}
ONE_OF_A_KIND = [
    pytest.param(row, id=row.model_type, marks=() if row.model_type in KINDS else pytest.mark.slow)
    for row in ARCHITECTURES
]
