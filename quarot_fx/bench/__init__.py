"""Measurements of the kernels on a GPU, behind ``quarot-fx bench``.

``timing``   medians of CUDA graphs over more data than the caches hold
``shapes``   the linear layers of well-known models
``matmul``   integer matrix products, with the quantisation of their input, against bfloat16
``fused``    norms, activations and transforms with quantisation, against a copy
``tune``     a search for launch parameters, which makes the tables that ``lowering/triton`` ships
"""
