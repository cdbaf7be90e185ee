"""Tiny random instances of the causal language models that transformers registers, of one configuration table.

A configuration class says what its fields are called; ``SIZES`` says how small each is to be. What does not fit
together then (as many keys as queries, say) is corrected for one architecture in ``tiny_decoders.json``, which also
tells decoders, hybrids of attention with state space models or linear attention, and former encoders apart.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LENGTH = 16
DATA = json.loads((Path(__file__).parent / "tiny_decoders.json").read_text(encoding="utf-8"))
DROP = "drop"  # a correction that leaves a field to its configuration's own default

_NAMES_BY_SIZE: dict[int, str] = {
    256: "vocab_size text_vocab_size vocab_size_per_layer_input",
    128: """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size dim_ff dff d_ff d_inner
        feed_forward_size intermediate_size_mlp block_ff_dim ffn_intermediate_size mlp_hidden_size
        dense_intermediate_size mamba_d_ssm max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length
        n_seq
    """,
    64: """
        hidden_size d_model n_embd dim embed_dim emb_dim model_dim embedding_size word_embed_proj_dim dim_model
        input_embedding_size attention_head_size lru_width conv_dim conv_dim_out attention_hidden_size
        audio_vocab_size max_target_positions max_source_positions original_max_position_embeddings vision_hidden_size
    """,
    32: """
        shared_intermediate_size moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size
        moe_shared_expert_intermediate_size expert_intermediate_size moe_ffn_hidden_size q_lora_rank qk_latent_dim
        image_size
    """,
    16: """
        hidden_size_per_layer_input head_dim attention_head_dim kv_channels global_head_dim swa_head_dim dim_head d_kv
        kv_lora_rank qk_head_dim v_head_dim o_lora_rank swa_v_head_dim index_head_dim mamba_d_head mamba_chunk_size
        chunk_size mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim attention_chunk_size
        patch_size
    """,
    8: """
        qk_rope_head_dim qk_nope_head_dim index_topk state_size ssm_state_size mamba_d_state mamba_dt_rank
        time_step_rank mamba_n_heads mamba_num_heads attention_window_size adapter_rank sliding_window
        attention_window local_window window_size sliding_window_size
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts
        moe_num_experts num_moe_experts n_experts swa_num_attention_heads compress_ratio mamba_d_conv
        linear_num_value_heads linear_conv_kernel_dim
    """,
    3: "conv_L_cache num_channels unk_token_id",
    2: """
        num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers encoder_layers
        num_encoder_layers num_blocks num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num
        num_experts_per_tok num_experts_per_token moe_topk moe_k top_k moe_top_k top_k_experts
        num_experts_per_tok_top_k zero_expert_num o_groups swa_num_key_value_heads index_n_heads mamba_expand expand
        n_mamba_heads linear_num_key_heads eos_token_id
    """,
    1: """
        moe_topk_per_group n_group topk_group n_groups num_expert_group n_shared_experts num_shared_experts
        moe_num_shared_experts first_k_dense_replace num_dense_layers moe_layer_start_index num_dense_ffn_layers
        mamba_n_groups mamba_ngroups num_mem_blocks bos_token_id decoder_start_token_id max_window_layers
    """,
    0: "num_zero_experts pad_token_id prompt_length",
}
SWITCHES = {
    "audio_config": None,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "use_cache": False,
    "use_shared_attention_adapter": False,
}
SIZES: dict[str, Any] = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names.split()} | SWITCHES
# These mean something else, or switch something off, where their default is None.
OPTIONAL = {
    *("q_lora_rank", "sliding_window", "n_inner", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("image_size", "adapter_rank", "audio_config", "num_mem_blocks", "moe_top_k", "top_k", "chunk_size"),
    "attention_window",
}


@dataclass(frozen=True)
class TinyDecoder:
    """A model in float32 and evaluation mode, and what to call it with."""

    config: PretrainedConfig
    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
        return next((n for name in names if isinstance(n := getattr(self.config, name, None), int)), 1)


def model_types(*categories: str) -> list[str]:
    """Names of architectures in the categories ``decoder``, ``hybrid`` and ``encoder-derived``."""
    return [name for category in categories for name in DATA["types"][category]]


def build(model_type: str) -> TinyDecoder:
    """A random instance, the same every time; no gain is 1 and no bias 0, for those would hide mistakes."""
    corrections = DATA["corrections"].get(model_type, {})
    config = CONFIG_MAPPING[model_type](**_settings(CONFIG_MAPPING[model_type], corrections.get("config", {})))
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(config, wanted) and hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()) or ())):
        if part is not None:
            part.use_cache = False
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(4, 250, (corrections.get("batch", 1), LENGTH), generator=generator)
    return TinyDecoder(config, model, {"input_ids": ids})


def first_logits(output: Any) -> torch.Tensor:
    """The logits in whatever a model returns."""
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        return output.logits
    values = output.values() if isinstance(output, Mapping) else output
    return output if isinstance(output, torch.Tensor) else next(v for v in values if isinstance(v, torch.Tensor))


def _settings(config_class: type, corrections: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make a configuration, and those within it, tiny."""
    defaults = _defaults(config_class)
    settings = {
        name: SIZES[name]
        for name, default in defaults.items()
        if name in SIZES
        and not (default is None and name in OPTIONAL)
        and not isinstance(default, list | tuple)  # a value for each layer: left to the configuration to derive
    }
    corrections = dict(corrections)
    for name, part in _parts(config_class).items():
        if name in defaults:
            settings[name] = _settings(part, corrections.pop(name, {})) | {"model_type": part.model_type}
    for name, value in corrections.items():
        if value == DROP:
            settings.pop(name, None)
        else:
            settings[name] = value
    return settings


def _defaults(config_class: type) -> dict[str, Any]:
    """Fields of a configuration class, with their defaults."""
    found: dict[str, Any] = {}
    if dataclasses.is_dataclass(config_class):
        for field in dataclasses.fields(config_class):
            makes = field.default_factory is not dataclasses.MISSING
            found[field.name] = field.default_factory() if makes else field.default  # type: ignore[misc]
    for name, parameter in inspect.signature(config_class.__init__).parameters.items():
        if name not in ("self", "kwargs", "args"):
            found.setdefault(name, parameter.default)
    missing = (dataclasses.MISSING, inspect.Parameter.empty)
    return {name: None if default in missing else default for name, default in found.items()}


def _parts(config_class: Any) -> dict[str, Any]:
    """Classes of the configurations that a configuration consists of."""
    declared = {**(getattr(config_class, "sub_configs", None) or {})}
    declared |= getattr(config_class, "sub_configs_defaults", None) or {}
    parts = {}
    for name, part in declared.items():
        model_type = getattr(part, "model_type", None)
        if not isinstance(part, type):  # a specification of a class, by model type or directly
            part = CONFIG_MAPPING.get(model_type, getattr(part, "config_class", None))
        if isinstance(part, type) and getattr(part, "model_type", None):
            parts[name] = part
    return parts
