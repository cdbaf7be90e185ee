"""The layers of a model's cache, as transformers' models and ``generate`` take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from quarot_fx.cache.formats import Format
from quarot_fx.cache.growing import GrowingLayer
from quarot_fx.cache.layer import PackedLayer
from quarot_fx.cache.options import CacheOptions
from quarot_fx.cache.report import CacheReport, LayerReport
from quarot_fx.cache.sliding import GrowingSlidingLayer, StaticSlidingLayer
from quarot_fx.cache.static import StaticLayer
from quarot_fx.errors import CacheModelError, OptionError

OWN_CACHE = "Let the model make its own cache"
PACKED = (DynamicLayer, DynamicSlidingWindowLayer)  # in whose place ours stand


class QuarotCache(Cache):
    """A KV cache that stores rotated keys and values in a few bits: ``model.generate(..., past_key_values=cache)``.

    Attention sees quantised keys and values, also those of the tokens that are just coming. So a prompt at once,
    in chunks, or token by token gives the same numbers.

    Args:
        config: of the model. Its layers that attend to all tokens or to a window of them are stored in a few bits;
            layers of other kinds are those of transformers' own caches, and :meth:`report` names them.
        max_cache_len: number of tokens to make room for. Tensors then keep their shapes and addresses, as compiled
            graphs and CUDA graphs need. ``None`` makes room as tokens come.
        options: those of :class:`CacheOptions`: ``k_bits=4``, ``v_bits=4``, ``kv_bits=None`` (both), ``group=None``
            (head_dim), ``k_clip``, ``v_clip`` (0.95 up to 5 bits, else 1), ``clip=None`` (both),
            ``rotation="hadamard"``, ``key_balance=None``.

    Raises:
        OptionError: an option has a value that it cannot have.
        UnknownOptionError: there is no such option.
        CacheModelError: no layer of the model stores keys and values alone, or a cache of this kind would give
            attention wrong keys.
    """

    def __init__(self, config: PretrainedConfig, max_cache_len: int | None = None, **options: Any) -> None:
        self.options = CacheOptions.from_mapping(options)
        if max_cache_len is not None and (not isinstance(max_cache_len, int) or max_cache_len < 1):
            raise OptionError(name="max_cache_len", value=max_cache_len, reason="must be 1 or more, or None to grow")
        super().__init__(layers=_layers(config.get_text_config(decoder=True), max_cache_len, self.options))

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device | str,
        v_head_dim: int | list[int] | None = None,
    ) -> None:
        """Make all tensors now, before anything is compiled or recorded.

        Args:
            batch_size: number of sequences; beams and returned sequences count.
            num_heads: number of key-value heads, or one for each layer.
            head_dim: size of a key, or one for each layer.
            dtype: of keys and values, as the model computes them.
            device: where.
            v_head_dim: size of a value, or one for each layer; ``None`` is that of a key.
        """
        sizes = (num_heads, head_dim, head_dim if v_head_dim is None else v_head_dim)
        per_layer = [[size] * len(self.layers) if isinstance(size, int) else size for size in sizes]
        for layer, heads, k_size, v_size in zip(self.layers, *per_layer, strict=True):
            make = torch.empty(batch_size, heads, 0, max(k_size, v_size), dtype=dtype, device=device)
            if layer.supports_early_init and not layer.is_initialized:
                layer.lazy_initialization(make[..., :k_size], make[..., :v_size])

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return self.report().nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a cache in bfloat16 with room for as many tokens takes."""
        return self.report().dense_nbytes

    def report(self) -> CacheReport:
        """Say what each layer stores, and why: as data, and as a table when it is printed."""
        return CacheReport(tuple(_report(index, layer) for index, layer in enumerate(self.layers)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.report().summary()})"


# -- which layers ----------------------------------------------------------------------------------


def _layers(config: PretrainedConfig, max_cache_len: int | None, options: CacheOptions) -> list[Any]:
    """Return transformers' own layers for a model, ours in the place of those that store keys and values alone."""
    try:
        growing = DynamicCache(config=config).layers
        static = None if max_cache_len is None else StaticCache(config=config, max_cache_len=max_cache_len).layers
    except (AttributeError, KeyError) as error:
        reason = f"transformers itself makes none of this kind for it: {error!r}"
        raise CacheModelError(what=f"a {config.model_type!r} model", reason=reason, remedy=OWN_CACHE) from error
    layers: list[Any] = []
    balances = iter(options.balances(sum(type(layer) in PACKED for layer in growing)))
    for index, layer in enumerate(growing):
        if type(layer) in PACKED:
            window = getattr(layer, "sliding_window", None)
            formats = options.formats(next(balances))
            layers.append(_packed_layer(f"layer {index}", window, max_cache_len, formats))
        else:
            layers.append(layer if static is None else static[index])
    _check_serves(config, layers, is_static=static is not None)
    return layers


def _packed_layer(
    where: str, window: int | None, max_cache_len: int | None, formats: tuple[Format, Format]
) -> PackedLayer:
    if max_cache_len is None:
        return GrowingLayer(*formats, where) if window is None else GrowingSlidingLayer(*formats, where, window)
    if window is None or max_cache_len <= window:
        return StaticLayer(*formats, where, max_cache_len, is_sliding=window is not None)
    return StaticSlidingLayer(*formats, where, window)


def _check_serves(config: PretrainedConfig, layers: list[Any], is_static: bool) -> None:
    what = f"a {config.model_type!r} model"
    if not any(isinstance(layer, PackedLayer) for layer in layers):
        reason = "none of its layers stores the keys and values of tokens, and nothing else"
        raise CacheModelError(what=what, reason=reason, remedy=OWN_CACHE)
    if not is_static:
        return
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        raise CacheModelError(
            what=what,
            reason="flash attention takes no mask, and so would attend to room that no token has filled",
            remedy='Load the model with attn_implementation="sdpa", or make the cache without max_cache_len',
        )
    if others := sorted({type(layer).__name__ for layer in layers if not layer.is_compileable}):
        # transformers then leaves out masks that static layers depend on.
        reason = f"it has layers ({', '.join(others)}) that grow, beside which static ones get no masks"
        raise CacheModelError(what=what, reason=reason, remedy="Make the cache without max_cache_len")


# -- the report ------------------------------------------------------------------------------------


def _report(index: int, layer: Any) -> LayerReport:
    if isinstance(layer, PackedLayer):
        k_bits, v_bits = (packed.format.bits for packed in layer.packed)
        reason = "" if layer.is_initialized else "tensors are made when the first token comes"
        known = (layer.nbytes, layer.dense_nbytes, reason, layer.uncompiled_tokens)
        return LayerReport(index, layer.kind, k_bits, v_bits, *known)
    nbytes = sum(tensor.nbytes for value in vars(layer).values() for tensor in _tensors(value))
    return LayerReport(index, type(layer).__name__, None, None, nbytes, nbytes, _why_not_ours(layer))


def _tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else [value]
    return [tensor for tensor in values if isinstance(tensor, Tensor)]


def _why_not_ours(layer: Any) -> str:
    if isinstance(layer, CacheLayerMixin):
        return "it stores more than keys and values"
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "it stores a state, not the keys and values of tokens"
    return "it stores nothing"
