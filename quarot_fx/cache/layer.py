"""What all layers of a cache have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from quarot_fx.cache.formats import Format
from quarot_fx.cache.packed import PackedTensor, lasting_tensors
from quarot_fx.errors import CropError, OptionError


class PackedLayer(CacheLayerMixin):
    """The keys and values of one attention layer, coded when they come and decoded when attention reads them.

    Attributes:
        packed_keys, packed_values: what is stored.
        uncompiled_tokens: that came from a model that was not compiled, and so computed them in full precision.
        where: the layer's name in messages.
    """

    is_sliding = False
    batch_size: int
    device: torch.device

    def __init__(self, key_format: Format, value_format: Format, where: str) -> None:
        # Not CacheLayerMixin's, which sets keys and values: here they are computed.
        self.where = where
        self.packed_keys = PackedTensor(key_format, f"the keys of {where}")
        self.packed_values = PackedTensor(value_format, f"the values of {where}")
        self.uncompiled_tokens = 0
        self.is_initialized = False

    @property
    def kind(self) -> str:
        """What the layer keeps, for a report."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]  # there an attribute
        """Keys that are stored, as attention reads them, [batch, heads, tokens, size]: decoded at every access."""
        return self._read(self.packed_keys) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]  # there an attribute
        """Values that are stored, as attention reads them, [batch, heads, tokens, size]: decoded at every access."""
        return self._read(self.packed_values) if self.is_initialized else None

    def _read(self, packed: PackedTensor) -> Tensor:
        return packed.read(int(self.get_seq_length()))

    @property
    def packed(self) -> tuple[PackedTensor, PackedTensor]:
        """Keys and values as they are stored."""
        return self.packed_keys, self.packed_values

    @property
    def initial_capacity(self) -> int:
        """Number of tokens that room is made for at first."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make all tensors, for keys and values like these, [batch, heads, any, size]."""
        self.batch_size, self.device = key_states.shape[0], key_states.device
        with lasting_tensors():
            self.packed_keys.allocate(key_states, self.initial_capacity)
            self.packed_values.allocate(value_states, self.initial_capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return those that attention reads, the new ones last.

        Args:
            key_states: [batch, heads, tokens, size of a key].
            value_states: [batch, heads, tokens, size of a value].
            *args: what models pass for other caches.
            **kwargs: likewise.

        Returns:
            Keys and values, [batch, heads, n, size], for the n and the positions that :meth:`get_mask_sizes` told.

        Raises:
            CacheInputError: another batch, number of heads, size or dtype than before.
            CacheFullError: a static layer has no room for so many tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        self.packed_keys.check_fits(key_states)
        self.packed_values.check_fits(value_states)
        if not torch.compiler.is_compiling():
            self.uncompiled_tokens += key_states.shape[-2]
            if torch.is_grad_enabled():
                key_states, value_states = key_states.detach(), value_states.detach()  # a graph would grow with them
        return self._append(key_states, value_states)

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all tokens. Tensors stay where they are."""
        self.uncompiled_tokens = 0
        for packed in self.packed:
            packed.replace(Tensor.zero_)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence i become what sequence ``beam_idx[i]`` is, in place."""
        for packed in self.packed:
            packed.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, each next to itself."""
        self._change_batch(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some sequences."""
        self._change_batch(lambda part: part[indices])

    def _change_batch(self, change: Any) -> None:
        if not self.is_initialized:
            return
        with lasting_tensors():
            for packed in self.packed:
                packed.replace(change)
        self.batch_size = self.packed_keys.parts[0].shape[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            OptionError: the number is positive.
            CropError: there are not as many tokens, or what was before them is gone.
        """
        count = -int(tokens_to_remove)
        if count < 0:
            raise OptionError(
                name="tokens_to_remove", value=-count, reason="must be 0 or less: -3 forgets the last 3 tokens"
            )
        length = int(self.get_seq_length())
        if count > length:
            raise CropError(tokens=count, where=self.where, reason=f"it holds {length}")
        self._crop(count, length)

    def _crop(self, count: int, length: int) -> None:
        raise NotImplementedError

    def offload(self) -> None:
        """Move what is stored to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move what is stored back to the device of the layer."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for packed in self.packed:
            if packed.parts and packed.parts[0].device != device:
                with lasting_tensors():
                    packed.replace(lambda part: part.to(device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(packed.nbytes for packed in self.packed)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that as many keys and values take in bfloat16."""
        return sum(packed.dense_nbytes() for packed in self.packed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kind}, K{self.packed_keys.format.bits} V{self.packed_values.format.bits})"
