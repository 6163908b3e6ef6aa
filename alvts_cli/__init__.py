"""Adaptive layer-wise visual token selection for vision-language models.

`import alvts_cli` stays quick: torch and transformers are loaded by the first use of `attach`.
"""

from typing import TYPE_CHECKING, Any

from .errors import AlvtsError

if TYPE_CHECKING:
    from .attaching import attach

__version__ = "0.1.0"
__all__ = ["AlvtsError", "__version__", "attach"]


def __getattr__(name: str) -> Any:
    if name == "attach":
        from .attaching import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
