"""Graph passes, one a file. Each is a small frozen dataclass that runs alone or in a pipeline.

``base``       the contract
``pipeline``   the default order, pipelines as text, and running them
``readers``    who reads a tensor's last axis: shared by the passes that fold
``repeated_heads``  what keys and values were before heads were repeated
``matching``   what tensors were before casts and views: shared by the passes that fuse, as are
``activations``  expressions that are activations, told by their values
``fusion``     one op in the place of several, if a kernel runs it
``int_linears``  products of codes, and how their weights become one
``quantized``  the nodes between real numbers and codes: shared by the passes that quantise
"""
