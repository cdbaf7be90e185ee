"""Decoders that are plain PyTorch, written the way well-known projects write theirs: one file a style.

All have 64 channels, 4 heads and two layers. ``STYLES`` says how each is called, and the rotation plan that one would
make for it by hand, in the terms of ``architectures.Architecture``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoders import gpt_fast, litgpt, llama2c, meta_llama, nanogpt, torchtune, x_transformers

BATCH = 2
MAX_LENGTH = 32
LAYERS = 2


@dataclass(frozen=True)
class Style:
    """One decoder.

    Attributes:
        name: of the style, and of the variant.
        make: makes the module; it is filled with random weights afterwards.
        inputs: (token ids, position of the first) -> keyword arguments of ``forward``.
        online, free, keys, values: as in ``architectures.Architecture``; ``output`` is what the caller sees.
        head: the weight that 4 bits are not for.
        set_up_caches: gives the module caches of its own.
        carry: what a call returned -> keyword arguments of the next call, for caches that are passed around.
        is_slow: whether it is left to ``make test-slow``.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[Tensor, int], dict[str, Any]]
    online: tuple[str, ...]
    free: int
    head: str
    keys: str = "online"
    values: str = "free"
    set_up_caches: Callable[[nn.Module], None] | None = None
    carry: Callable[[Any], dict[str, Any]] | None = None
    is_slow: bool = False

    @property
    def has_cache(self) -> bool:
        """Whether tokens can come a few at a time."""
        return self.set_up_caches is not None or self.carry is not None

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A module in evaluation mode. No gain is 1 and no bias 0: those would hide mistakes."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = self.make().eval()
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim == 1:
                    parameter += 0.2 * noise
                else:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        model = model.to(dtype)
        if self.set_up_caches is not None:
            self.set_up_caches(model)
        return model


def logits(output: Any) -> Tensor:
    """What a style's ``forward`` returns first."""
    return output[0] if isinstance(output, tuple) else output


LLAMA = ("query", "key", "attention.wo", "feed_forward.w2")
# A cache is the module's or the caller's: values go into it in the canonical basis and are rotated when they are read.
CACHED_VALUES = ("output value", "value")

STYLES = (
    Style(
        "nanogpt",
        nanogpt.GPT,
        lambda ids, start: {"idx": ids},
        online=("attn.c_proj", "mlp.c_proj"),
        free=2 * LAYERS + 1,
        keys="free",
        head="transformer.wte.weight",
    ),
    Style(
        "nanogpt-without-flash",
        lambda: nanogpt.GPT(flash=False, bias=False),
        lambda ids, start: {"idx": ids},
        online=("attn.c_proj", "mlp.c_proj"),
        free=2 * LAYERS + 1,
        keys="free",
        head="transformer.wte.weight",
    ),
    Style(
        "llama2c",
        llama2c.Transformer,
        lambda ids, start: {"tokens": ids},
        online=LLAMA,
        free=5 * LAYERS + 1,
        head="tok_embeddings.weight",
    ),
    Style(
        "llama2c-without-flash",
        lambda: llama2c.Transformer(flash=False),
        lambda ids, start: {"tokens": ids},
        online=LLAMA,
        free=5 * LAYERS + 1,
        head="tok_embeddings.weight",
        is_slow=True,
    ),
    Style(
        "gpt_fast",
        gpt_fast.Transformer,
        lambda ids, start: {"idx": ids, "input_pos": torch.arange(start, start + ids.shape[1])},
        online=(*LLAMA, *CACHED_VALUES),
        free=3 * LAYERS + 1,
        values="online",
        head="output.weight",
        set_up_caches=lambda model: model.setup_caches(BATCH, MAX_LENGTH),
    ),
    Style(
        "meta_llama",
        meta_llama.Transformer,
        lambda ids, start: {"tokens": ids, "start_pos": start},
        online=(*LLAMA, *CACHED_VALUES),
        free=5 * LAYERS + 1,
        values="online",
        head="output.weight",
        set_up_caches=lambda model: None,  # it makes them itself
    ),
    Style(
        "torchtune",
        torchtune.TransformerDecoder,
        lambda ids, start: {"tokens": ids},
        online=("query", "key", "attn.output_proj", "mlp.w2"),
        free=5 * LAYERS + 1,
        head="output.weight",
        is_slow=True,
    ),
    Style(
        "torchtune-cache",
        torchtune.TransformerDecoder,
        lambda ids, start: torchtune_inputs(ids, start),
        online=("query", "key", "attn.output_proj", "mlp.w2", *CACHED_VALUES),
        free=5 * LAYERS + 1,
        values="online",
        head="output.weight",
        set_up_caches=lambda model: model.setup_caches(BATCH, MAX_LENGTH),
    ),
    Style(
        "x_transformers",
        x_transformers.TransformerWrapper,
        lambda ids, start: {"x": ids},
        online=("to_out", "ff.2", "output", "output"),
        free=4 * LAYERS + 1,
        keys="free",
        head="to_logits.weight",
        carry=lambda output: {"cache": output[1]},
    ),
    Style(
        "x_transformers-scale-norm",
        lambda: x_transformers.TransformerWrapper(
            norm=x_transformers.ScaleNorm, rel_pos=x_transformers.RelativePositionBias
        ),
        lambda ids, start: {"x": ids},
        online=("to_out", "ff.2", "output", "output"),
        free=4 * LAYERS + 1,
        keys="free",
        head="to_logits.weight",
        carry=lambda output: {"cache": output[1]},
        is_slow=True,
    ),
    Style(
        "litgpt",
        litgpt.GPT,
        lambda ids, start: {"idx": ids},
        online=("query", "key", "attn.proj", "mlp.proj"),
        free=2 * LAYERS + 1,
        head="lm_head.weight",
    ),
    Style(
        "litgpt-cache",
        lambda: litgpt.GPT(norm=litgpt.RMSNorm, parallel_residual=False),
        lambda ids, start: {"idx": ids, "input_pos": torch.arange(start, start + ids.shape[1])},
        online=("query", "key", "attn.proj", "mlp.proj", *CACHED_VALUES),
        free=2 * LAYERS + 1,
        values="online",
        head="lm_head.weight",
        set_up_caches=lambda model: model.set_kv_cache(BATCH),
        is_slow=True,
    ),
)


def torchtune_inputs(ids: Tensor, start: int) -> dict[str, Any]:
    """Token ids with their positions and the rows of the causal mask that belong to them."""
    positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
    causal_mask = torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool))
    return {"tokens": ids, "mask": causal_mask[positions], "input_pos": positions}
