"""A KV cache that stores rotated keys and values in a few bits.

``formats``       how a key or value is coded
``packed``        the coded keys, or values, of one layer
``layer``         what all layers of a cache have in common
``static``        a layer with room for a given number of tokens
``growing``       a layer that makes room as tokens come
``sliding``       layers that keep a window of tokens: static, and growing
``quarot_cache``  the layers of a model, as transformers' models take them
``options``       how keys and values are coded, by name
``report``        what each layer stores, and why
``generation``    the cache for a model, in one line
"""
