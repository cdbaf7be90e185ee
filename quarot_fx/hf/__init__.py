"""The plug-in for transformers: importing this module makes ``from_pretrained`` know ``quant_method: quarot``.

``config``     ``QuarotQuantizationConfig``, the options as transformers keeps them
``quantizer``  loads a checkpoint into a model that ``from_pretrained`` builds, or compiles one that it has loaded
"""

from quarot_fx.hf.config import QuarotQuantizationConfig
from quarot_fx.hf.quantizer import QuarotQuantizer

__all__ = ["QuarotQuantizationConfig", "QuarotQuantizer"]
