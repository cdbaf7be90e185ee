"""The cache for a model, in one line."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quarot_fx.cache.layer import PackedLayer
from quarot_fx.cache.quarot_cache import OWN_CACHE, QuarotCache
from quarot_fx.cache.static import StaticLayer
from quarot_fx.config import UNQUANTIZED_BITS
from quarot_fx.errors import CacheModelError, OptionError
from quarot_fx.float64 import relative_difference

LARGE = 1e4  # a value that would be noticed, and that float16 has
TOLERANCE = 0.05
GROW = "Make the cache without max_cache_len"


def generation_cache(model: Any, max_cache_len: int | None = None, batch_size: int = 1, **options: Any) -> QuarotCache:
    """Return the cache for a model, its tensors made where the model is.

    What shapes, dtypes and devices keys and values have, the model shows: it runs a token or two, uncompiled.

    Args:
        model: a causal language model of transformers, compiled or not.
        max_cache_len: number of tokens to make room for; ``None`` makes room as tokens come.
        batch_size: number of sequences; beams and returned sequences count.
        options: ``k_bits=4``, ``v_bits=4``, ``kv_bits=None`` (both), ``group=None`` (head_dim),
            ``k_clip``, ``v_clip`` (0.95 up to 5 bits, else 1), ``clip=None`` (both), ``rotation="hadamard"``,
            ``key_balance=None``.

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
    _initialize(cache, model, batch_size)
    if max_cache_len is not None and not getattr(model, "_can_compile_fullgraph", False):
        _check_masks(model, max_cache_len)
    return cache


def _check_takes_a_cache(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise _no_cache_for(model, "it is not a model of transformers, whose config says what its layers store")
    if model.config.is_encoder_decoder:
        raise _no_cache_for(model, "its decoder attends to an encoder, too, whose keys and values are another cache")
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise _no_cache_for(model, "it takes no cache but one of its own kind")


def _initialize(cache: QuarotCache, model: PreTrainedModel, batch_size: int) -> None:
    """Make the tensors of all layers that store keys and values, for such as a model makes of one token."""
    trial = QuarotCache(model.config, kv_bits=UNQUANTIZED_BITS)
    _logits_of_a_token(model, trial)
    layer: Any
    tried: Any
    for layer, tried in zip(cache.layers, trial.layers, strict=True):
        if layer.supports_early_init and tried.keys is not None:
            layer.lazy_initialization(*(_without_tokens(x, batch_size) for x in (tried.keys, tried.values)))
        elif isinstance(layer, PackedLayer):
            raise _no_cache_for(model, "it stores nothing in a cache that it is given")


def _check_masks(model: PreTrainedModel, max_cache_len: int) -> None:
    """Check that a model does not attend to room that is empty. Of those that transformers says can be compiled, it
    has seen to that; others may make masks of their own.
    """
    empty = QuarotCache(model.config, max_cache_len, kv_bits=UNQUANTIZED_BITS)
    _logits_of_a_token(model, empty)
    filled = copy.deepcopy(empty)
    for layer in filled.layers:
        if isinstance(layer, StaticLayer):
            layer.packed_values.parts[0][:, :, 1:] = LARGE
    try:
        logits = [_logits_of_a_token(model, cache) for cache in (empty, filled)]
    except RuntimeError as error:
        raise _no_cache_for(model, f"with one that has room for more tokens it fails: {error}", GROW) from error
    if not logits[0].numel():
        raise _no_cache_for(model, "it takes all tokens at every step, not the new ones alone", GROW)
    if relative_difference(logits[:1], logits[1:]) > TOLERANCE:
        raise _no_cache_for(model, "its masks do not hide room that no token has filled", GROW)


def _no_cache_for(model: Any, reason: str, remedy: str = OWN_CACHE) -> CacheModelError:
    return CacheModelError(what=f"a {type(model).__name__}", reason=reason, remedy=remedy)


def _logits_of_a_token(model: PreTrainedModel, cache: QuarotCache) -> Tensor:
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits


def _without_tokens(x: Tensor, batch_size: int) -> Tensor:
    """Return a tensor like keys or values [1, heads, tokens, size], for more sequences and no tokens."""
    return x.new_empty((batch_size, x.shape[1], 0, x.shape[3]))
