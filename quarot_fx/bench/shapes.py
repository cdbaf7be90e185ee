"""The linear layers of three decoders, with q, k, v and gate, up as one product each: [rows, columns] of the weight."""

from __future__ import annotations

MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-2-7B": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "Llama-3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "Llama-2-70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
REFERENCE_SHAPES: dict[str, tuple[int, int]] = {"14336 x 4096": (14336, 4096), "8192 x 28672": (8192, 28672)}
TOKENS = tuple(2**n for n in range(15))


def distinct_shapes() -> dict[tuple[int, int], str]:
    """Return each shape once, with the layers that have it."""
    names: dict[tuple[int, int], list[str]] = {}
    for model, layers in MODELS.items():
        for layer, shape in layers.items():
            names.setdefault(shape, []).append(f"{model} {layer}")
    for shape in REFERENCE_SHAPES.values():
        names.setdefault(shape, ["one projection of the MLP"])
    return {shape: ", ".join(layers) for shape, layers in names.items()}
