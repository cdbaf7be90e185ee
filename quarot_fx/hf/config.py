"""The options of quarot as transformers keeps them: in ``config.json``, and as an argument of ``from_pretrained``."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from quarot_fx.config import QuarotConfig

METHOD = "quarot"


@register_quantization_config(METHOD)
class QuarotQuantizationConfig(QuantizationConfigMixin):
    """``from_pretrained(name, quantization_config=QuarotQuantizationConfig(w_bits=8))``.

    Args:
        options: fields of :class:`~quarot_fx.config.QuarotConfig`.

    Attributes:
        quarot: the config that they give.

    Raises:
        UnknownOptionError: there is no such option.
        OptionError: an option has a value that it cannot have.
    """

    def __init__(self, **options: Any) -> None:
        self.quant_method = options.pop("quant_method", METHOD)
        self.quarot = QuarotConfig.from_options(options)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data: the options that weights depend on and that are not the default."""
        return {"quant_method": METHOD, **self.quarot.of_weights().as_options()}
