"""The operators of a rewritten graph, ``torch.ops.quarot.*``, under short names: one declaration a file."""

from quarot_fx.ops.declaration import DECLARATIONS, OpDeclaration, declare
from quarot_fx.ops.dequantize import dequantize
from quarot_fx.ops.expert_linear import expert_linear
from quarot_fx.ops.mean_square import mean_square
from quarot_fx.ops.pack import pack
from quarot_fx.ops.project_out import project_out
from quarot_fx.ops.quantize_asymmetric import quantize_asymmetric
from quarot_fx.ops.quantize_symmetric import quantize_symmetric
from quarot_fx.ops.rotate import rotate
from quarot_fx.ops.unpack import unpack

__all__ = [
    "DECLARATIONS",
    "OpDeclaration",
    "declare",
    "dequantize",
    "expert_linear",
    "mean_square",
    "pack",
    "project_out",
    "quantize_asymmetric",
    "quantize_symmetric",
    "rotate",
    "unpack",
]
