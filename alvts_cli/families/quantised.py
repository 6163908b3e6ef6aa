"""Which libraries' quantised weights alvts can read."""

from typing import Any

from ..errors import AlvtsError

READ = ("bitsandbytes", "torchao", "compressed-tensors")
"""By the names that transformers has for them. What compressed-tensors made is dequantised where it
is loaded by name, and then has other weights than the model it was made of."""


def quantised_by(config: Any) -> str | None:
    """The library that a checkpoint's weights were quantised by; None where they were not.

    Args:
        config: of the whole model, as loaded from the checkpoint or as the model has it.
    """
    for part in (config, getattr(config, "text_config", None)):
        found = getattr(part, "quantization_config", None)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
            return str(getattr(method, "value", method))
    return None


def check_quantised(config: Any) -> None:
    """Refuse weights that cannot be read.

    Raises:
        AlvtsError: they are quantised by a library that is not among `READ`.
    """
    method = quantised_by(config)
    if method is not None and method not in READ:
        raise AlvtsError(
            f"this model is quantised by {method}, whose weights alvts cannot read; it reads those "
            f"of {', '.join(READ[:-1])} and {READ[-1]}: use such a copy, or the model in full "
            "precision"
        )
