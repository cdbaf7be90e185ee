"""Measurements on a GPU, behind ``quarot-fx bench``.

``timing``   medians of CUDA graphs over more data than the caches hold, and of the steps of a model
``memory``   what PyTorch has allocated
``shapes``   well-known decoders, and their linear layers
``matmul``   integer matrix products, with the quantisation of their input, against bfloat16
``peers``    the same products by other libraries
``fused``    norms, activations and transforms with quantisation, against a copy
``attention`` few queries to a cache, against PyTorch's kernels
``hadamard`` what an online transform adds to a product
``gated``    what it saves that a product gates its own halves
``models``   decoder layers and whole models: prefill, decode, memory
``capacity`` how much context fits into a GPU
``record``   what was measured, to JSON and back; ``tables`` and ``plot`` show it
``tune``     a search for launch parameters, which makes the tables that ``lowering/triton`` ships
"""
