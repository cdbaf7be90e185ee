"""Providers ``"aten"``: PyTorch's own operators, where they do better than an op's reference.

``rotate``        products with small matrices in the activation's own type
"""

from quarot_fx.lowering.aten import rotate
from quarot_fx.ops import DECLARATIONS, Provider

DECLARATIONS["rotate"].providers["aten"] = Provider(rotate.reason_against, rotate.rotate, rotate.prepare)
