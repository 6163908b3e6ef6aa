"""Adaptive layer-wise visual token selection for vision-language models.

`import alvts_cli` stays quick: torch and transformers are loaded by the first use of a name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import AlvtsError

if TYPE_CHECKING:
    from calibration.run import calibrate

    from .artifact import Artifact
    from .attaching import attach

__version__ = "0.2.0"
__all__ = ["AlvtsError", "Artifact", "__version__", "attach", "calibrate"]

_LATER = {
    "Artifact": "alvts_cli.artifact",
    "attach": "alvts_cli.attaching",
    "calibrate": "calibration.run",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
