"""The operators of a rewritten graph, ``torch.ops.quarot.*``, under short names: one declaration a file."""

from quarot_fx.ops.append import append
from quarot_fx.ops.append_dequantize import append_dequantize
from quarot_fx.ops.append_pair import append_pair
from quarot_fx.ops.attend import attend
from quarot_fx.ops.attend_packed import attend_packed
from quarot_fx.ops.balance import balance
from quarot_fx.ops.declaration import DECLARATIONS, OpDeclaration, Provider, declaration_of, declare
from quarot_fx.ops.dequantize import dequantize
from quarot_fx.ops.expert_linear import expert_linear
from quarot_fx.ops.float_linear import float_linear
from quarot_fx.ops.gated_int_linear import gated_int_linear
from quarot_fx.ops.int_linear import int_linear
from quarot_fx.ops.interleave_rows import interleave_rows
from quarot_fx.ops.mean_square import mean_square
from quarot_fx.ops.norm_int_linear import norm_int_linear
from quarot_fx.ops.norm_quantize import norm_quantize
from quarot_fx.ops.pack import pack
from quarot_fx.ops.pack_weight import pack_weight
from quarot_fx.ops.project_out import project_out
from quarot_fx.ops.quantize_activation import quantize_activation
from quarot_fx.ops.quantize_asymmetric import quantize_asymmetric
from quarot_fx.ops.quantize_symmetric import quantize_symmetric
from quarot_fx.ops.quantize_weight import quantize_weight
from quarot_fx.ops.rope_rotate import rope_rotate
from quarot_fx.ops.rotate import rotate
from quarot_fx.ops.rotate_quantize import rotate_quantize
from quarot_fx.ops.unpack import unpack

__all__ = [
    "DECLARATIONS",
    "OpDeclaration",
    "Provider",
    "append",
    "append_dequantize",
    "append_pair",
    "attend",
    "attend_packed",
    "balance",
    "declaration_of",
    "declare",
    "dequantize",
    "expert_linear",
    "float_linear",
    "gated_int_linear",
    "int_linear",
    "interleave_rows",
    "mean_square",
    "norm_int_linear",
    "norm_quantize",
    "pack",
    "pack_weight",
    "project_out",
    "quantize_activation",
    "quantize_asymmetric",
    "quantize_symmetric",
    "quantize_weight",
    "rope_rotate",
    "rotate",
    "rotate_quantize",
    "unpack",
]
