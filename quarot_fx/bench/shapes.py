"""The shapes of three well-known decoders, and of their linear layers: q, k, v and gate, up as one product each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """What a decoder's size follows from."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return [rows, columns] of the weights of a layer."""
        head = self.hidden // self.heads
        return {
            "qkv": ((self.heads + 2 * self.key_value_heads) * head, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def config(self, layers: int, positions: int) -> Any:
        """Return the config of a decoder of this shape, with so many layers, for so many positions."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            "llama",
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=positions,
        )


MODELS = {
    "Llama-2-7B": DecoderShape(4096, 11008, 32, heads=32, key_value_heads=32, vocabulary=32000),
    "Llama-3-8B": DecoderShape(4096, 14336, 32, heads=32, key_value_heads=8, vocabulary=128256),
    "Llama-2-70B": DecoderShape(8192, 28672, 80, heads=64, key_value_heads=8, vocabulary=32000),
}
REFERENCE_SHAPES: dict[str, tuple[int, int]] = {"14336 x 4096": (14336, 4096), "8192 x 28672": (8192, 28672)}
TOKENS = tuple(2**n for n in range(15))


def distinct_shapes() -> dict[tuple[int, int], str]:
    """Return each shape of a linear layer once, with the layers that have it."""
    names: dict[tuple[int, int], list[str]] = {}
    for model, decoder in MODELS.items():
        for layer, shape in decoder.linears().items():
            names.setdefault(shape, []).append(f"{model} {layer}")
    for shape in REFERENCE_SHAPES.values():
        names.setdefault(shape, ["one projection of the MLP"])
    return {shape: ", ".join(layers) for shape, layers in names.items()}
