"""Graph passes, one a file. Each is a small frozen dataclass that runs alone or in a pipeline.

``base``      the contract
``pipeline``  the default order, pipelines as text, and running them
"""
