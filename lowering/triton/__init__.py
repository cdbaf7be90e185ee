"""Triton kernels for NVIDIA GPUs from Ampere on, one a file, as the provider ``"triton"`` of their ops.

Importing this package imports neither Triton nor CUDA: ``<op>.py`` is imported when its op first runs, and
``preparation`` when a graph with one is compiled.

``<op>``          launches the kernels of ``quarot::<op>``
``append_prompt``  ``append`` of many tokens
``appended``      what is appended, as its kernels are told
``rotate_quantize_parts``  ``rotate_quantize`` of few long rows that have no slabs
``rotate_quantize_shared``  ``rotate_quantize`` of many long rows
``stacked_slabs``  how these lie in shared memory
``rotate_slabs``  the part of a Hadamard transform that a warp does by itself
``float_linear_tokens``  ``float_linear`` of more tokens than one
``int_gemv``      the matrix product for one or two tokens
``int_matmul``    the matrix product for any number of tokens
``split_attention``  what the kernels of ``attend`` and ``attend_packed`` share
``packed_operands``  packed keys and values as operands of tensor cores
``packed_codes``  device functions that make numbers of packed codes
``pairs``         device functions that take two 16-bit numbers an instruction
``quantization``  device functions that quantise
``activations``   device functions that apply an activation
``language``      device functions that differ in the interpreter
``explicit_layouts``  the same of Gluon, Triton with explicit layouts
``device``        what a device can do
``rows``          where the rows of an activation are
``rotation_matrices``  a Hadamard transform as products with small matrices
``tiles``         launch parameters, from measured tables
``support``       which arguments each op's kernels take
``preparation``   what launches need besides their arguments
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from quarot_fx.lowering.triton.support import REASONS
from quarot_fx.ops import DECLARATIONS, Provider


def _launcher(name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return getattr(import_module(f"{__name__}.{name}"), name)(*args)

    return launch


def _preparation(name: str) -> Callable[..., None]:
    def prepare(*args: Any) -> None:
        preparation = import_module(f"{__name__}.preparation")
        if name in preparation.PREPARATIONS:
            preparation.PREPARATIONS[name](*args)

    return prepare


for _name, _reason_against in REASONS.items():
    DECLARATIONS[_name].providers["triton"] = Provider(_reason_against, _launcher(_name), _preparation(_name))
