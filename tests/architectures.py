"""Decoder architectures: two layers of each, and the rotation plan that one would make for it by hand.

Every architecture has 2 layers of 64 channels and 4 heads, with 2 heads of keys and values where it has such. Options
that change the graph (multipliers, soft caps, biases, norms of queries and keys, partial rotary) are set to values
that a mistake would show under.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models import tiny_model
from transformers import PreTrainedModel

QUERY_AND_KEY = {"query": 2, "key": 2}  # after RoPE, one each per layer
GATED = {"o_proj": 2, "down_proj": 2} | QUERY_AND_KEY  # QuaRot's plan for Llama
# Where norms stand after attention and MLP, their gains keep the residual stream in its own basis.
SANDWICH = {"q_proj k_proj v_proj": 2, "gate_proj up_proj": 2}
HEAD = "lm_head.weight"
TIED_HEAD = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: what transformers calls it.
        settings: of its config, besides the sizes that all rows share.
        online: what reads the result of an online transform -> number of such transforms in the two layers.
        linears: how many linear layers are rotated for free, behind an online transform, and not at all.
        keys, values: likewise, the same for both layers.
        declined: pass -> places that it leaves alone in rotating.
        barriers: operators without a rule.
        unquantized: weights that stay as they are: output heads and routers.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    online: Mapping[str, int] = field(default_factory=lambda: GATED)
    linears: Mapping[str, int] = field(default_factory=lambda: {"free": 11, "online": 4})
    keys: str = "online"
    values: str = "free"
    declined: Mapping[str, int] = field(default_factory=dict)
    barriers: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = (HEAD,)

    def build(self, **settings: Any) -> PreTrainedModel:
        """A random float32 model in evaluation mode, the same every time."""
        return tiny_model(self.model_type, **{**self.settings, **settings})


ARCHITECTURES = (
    Architecture("llama"),
    Architecture("mistral", {"sliding_window": 8}),
    Architecture("qwen2"),  # biases of q, k and v
    Architecture("qwen3", {"head_dim": 32}),
    Architecture("gemma", {"head_dim": 32}),
    Architecture("gemma2", {"attn_implementation": "eager", "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
    Architecture("gemma3_text", {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    Architecture("phi", {"num_key_value_heads": 2}),
    Architecture("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    Architecture("olmo2"),
    Architecture("cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
    Architecture("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.2}),
    Architecture("stablelm", {"use_qkv_bias": True}),
    Architecture("gpt_neox"),
    Architecture("opt", {"ffn_dim": 176}),
    Architecture("gpt2", {"n_inner": 176}),
    Architecture("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("phi", {"num_key_value_heads": 2,"qk_layernorm":True}),
    Architecture("cohere",),
    Architecture("stablelm",{"qk_layernorm":True}),
    Architecture("stablelm",{"use_parallel_residual":True}),
    Architecture("gpt_neox",{"use_parallel_residual":False}),
    Architecture("opt",{"do_layer_norm_before":False, "word_embed_proj_dim":32}),
    Architecture("granite",{"attention_bias":True, "mlp_bias":True}),
    Architecture("gpt2", {"n_inner": 176,"attn_implementation": "eager","scale_attn_by_inverse_layer_idx":True}),
    Architecture("llama", {"num_key_value_heads": 1,"tie_word_embeddings":True}),
)
