"""The non-terminals: what is computed, told by the shapes that go in and out. Productions take the scope first."""


class Layer:
    """``[batch, tokens, hidden]`` -> the same: what the residual stream goes through."""


class Norm:
    """``[..., c]`` -> the same."""


class Linear:
    """``[..., in]``, out -> ``[..., out]``."""


class Mixer:
    """``[batch, tokens, hidden]`` -> the same: attention or a feed-forward, whose result is added to the stream."""


class Activation:
    """Element by element."""


class Packed:
    """``[..., in]``, sizes -> one ``[..., size]`` for each size, from one weight."""


class Projection:
    """``[batch, tokens, hidden]`` -> queries, keys and values ``[batch, heads, tokens, head_dim]``."""


class Positions:
    """``[batch, heads, tokens, head_dim]`` -> the same."""


class Cache:
    """New keys and values ``[batch, heads, tokens, head_dim]`` -> those that are attended to."""


class Kernel:
    """Queries, keys, values -> ``[batch, heads, tokens, head_dim]``."""


class Trap:
    """``[..., c]`` -> the same: fits everywhere."""
