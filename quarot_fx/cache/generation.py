"""The cache for a model, in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quarot_fx.cache.layer import PackedLayer
from quarot_fx.cache.quarot_cache import QuarotCache, initialize
from quarot_fx.errors import CacheModelError, OptionError


def generation_cache(model: Any, max_cache_len: int | None = None, batch_size: int = 1, **options: Any) -> QuarotCache:
    """Return the cache for a model, its tensors made where the model is.

    What shapes, dtypes and devices keys and values have, the model shows: it runs one token, uncompiled.

    Args:
        model: a causal language model of transformers, compiled or not.
        max_cache_len: number of tokens to make room for; ``None`` makes room as tokens come.
        batch_size: number of sequences; beams and returned sequences count.
        options: ``k_bits=4``, ``v_bits=4``, ``kv_bits=None`` (both), ``group=None`` (head_dim), ``clip=0.95``,
            ``rotation="hadamard"``.

    Raises:
        OptionError: an option has a value that it cannot have.
        UnknownOptionError: there is no such option.
        CacheModelError: the model cannot use such a cache.
        GroupSizeError: ``group`` does not divide the size of a key or value.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(name="batch_size", value=batch_size, reason="must be 1 or more")
    model = getattr(model, "_orig_mod", model)
    _check_takes_a_cache(model)
    cache = QuarotCache(model.config, max_cache_len, **options)
    shown = _after_one_token(model)
    for index, layer in enumerate(cache.layers):
        keys, values = (getattr(shown.layers[index], name, None) for name in ("keys", "values"))
        if keys is not None:
            initialize(layer, _without_tokens(keys, batch_size), _without_tokens(values, batch_size))
        elif isinstance(layer, PackedLayer):
            raise _no_cache_for(model, "it stores nothing in a cache that it is given")
    return cache


def _check_takes_a_cache(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise _no_cache_for(model, "it is not a model of transformers, whose config says what its layers store")
    if model.config.is_encoder_decoder:
        raise _no_cache_for(model, "its decoder attends to an encoder, too, whose keys and values are another cache")
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise _no_cache_for(model, "it takes no cache but one of its own kind")


def _no_cache_for(model: Any, reason: str) -> CacheModelError:
    remedy = "Let the model make its own cache"
    return CacheModelError(what=f"a {type(model).__name__}", reason=reason, remedy=remedy)


def _after_one_token(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    return cache


def _without_tokens(x: Tensor, batch_size: int) -> Tensor:
    """Return a tensor like keys or values [1, heads, tokens, size], for more sequences and no tokens."""
    return x.new_empty((batch_size, x.shape[1], 0, x.shape[3]))
