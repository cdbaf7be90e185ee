"""From a rewritten graph to something that runs.

``lift``          constants become inputs, so that one compiled graph serves every set of weights
``nested``        the compiler that gets the graph: Inductor or any other backend
``providers``     which implementation runs an op: the first that takes its arguments
``aten``          PyTorch's own operators, as providers of the ops
``triton``        kernels for NVIDIA GPUs, as providers of the ops
"""
