"""The clip ratio of keys, and that of values, by what quantisation changes in them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from quarot_fx.attention import before_repetition, reads_of_keys_and_values
from quarot_fx.calibration.programs import Programs
from quarot_fx.calibration.report import CalibratedCaches
from quarot_fx.calibration.stream import Stream
from quarot_fx.config import QuarotConfig
from quarot_fx.graph import AUTHOR, argument_nodes
from quarot_fx.passes.quantize_caches import QuantizeCaches
from quarot_fx.passes.quantized import quantization_behind, rounded, scheme_of, set_clip
from quarot_fx.progress import track

# Many, since no product follows as it does for inputs of layers; all are tried while the data is gone through once.
RATIOS = tuple(round(1 - step / 50, 2) for step in range(21))  # 1.00, 0.98, ... 0.60


def search_cache_clip(
    kind: str, programs: Programs, sequences: Tensor, config: QuarotConfig, offload: bool
) -> CalibratedCaches:
    """Find the ratio with the least ``sum |x - Q(x)|^2 / sum |x|^2`` over calibration data, on average over all keys
    or all values that attention reads.

    Args:
        kind: ``"key"`` or ``"value"``.
        programs: the model.
        sequences: token ids [n, length].
        config: bits, groups and symmetry of keys and values.
        offload: keep values on the CPU while they wait.
    """
    program = QuantizeCaches(config.with_provisional_clips())(programs.rotated)
    sites = _quantizations(program.graph, kind)
    sources = [site.all_input_nodes[0] for site in sites]
    tokens, inputs = programs.token_input(program), programs.inputs(program)
    stream = Stream(program.graph, tokens, sequences.split(1), inputs, sources, offload)
    relative = torch.zeros(len(RATIOS), dtype=torch.float64, device=sequences.device)
    for site, source in zip(track(sites, f"clip ratio of {kind}s"), sources, strict=True):
        stream.advance([source])
        sums = torch.zeros(1 + len(RATIOS), dtype=torch.float64, device=sequences.device)
        for x in map(Tensor.float, stream.values(source)):
            errors = (x - rounded(x, replace(scheme_of(site), clip=ratio)) for ratio in RATIOS)
            sums += torch.stack([one.square().sum().double() for one in (x, *errors)])
        relative += sums[1:] / sums[0].clamp_min(torch.finfo(torch.float64).tiny)
        stream.forget([source])
    mean = (relative / max(len(sites), 1)).sqrt().tolist()
    best = mean.index(min(mean))
    return CalibratedCaches(kind, RATIOS[best], mean[best], mean[0])


def use_cache_clip(programs: Programs, found: CalibratedCaches) -> None:
    """Let keys or values be clipped as was found, where the graph quantises them."""
    for quantization in _quantizations(programs.quantized.graph, found.kind):
        set_clip(quantization, found.clip)


def _quantizations(graph: fx.Graph, kind: str) -> list[fx.Node]:
    """Return the nodes that quantise keys or values for attention."""
    found = dict[fx.Node, None]()
    for read in reads_of_keys_and_values(graph):
        if read.kind == kind:
            user, place = before_repetition(read)
            quantization = quantization_behind(argument_nodes(user)[place])
            if quantization is not None and quantization.meta.get(AUTHOR) == QuantizeCaches().name:
                found[quantization] = None
    return list(found)
