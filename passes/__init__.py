"""Graph passes, one a file. Each is a small frozen dataclass that runs alone or in a pipeline.

``base``       the contract
``pipeline``   the default order, pipelines as text, and running them
``readers``    who reads a tensor's last axis: shared by the passes that fold
``repeated_heads``  what keys and values were before heads were repeated
``quantized``  the nodes between real numbers and codes: shared by the passes that quantise
"""
