"""Checkpoints: what compilation makes of a model's weights, in a folder, so that it need not be made again.

``saving``     the public function ``save``: evaluates the constants of all graphs of a model, and writes them
``loading``    the public function ``load``: a model whose graphs find their constants in a folder
``absorbing``  the public function ``absorb_rotations``: a model in rotated bases that other runtimes read
``learned``    the matrices of learned rotations, which the options only name
``balances``   the same of those that balance keys
``damage``     the error of one that says what none of ours says
``manifest``   what a checkpoint says about itself, as data, and as JSON that is read with suspicion
``shards``     safetensors files that are written so that no crash leaves half a checkpoint, and read against checksums
``saved``      where the compiler looks up values that a checkpoint holds
``skeleton``   transformers models without weights, from what a checkpoint says about them
"""
