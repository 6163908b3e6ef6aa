"""`alvts_cli.attach`: the engine's, which takes files and hub ids of selectors too."""

import os
from collections.abc import Mapping
from typing import Any

from .artifact import Artifact
from .engine import Attachment, Keep, Policy, Selectors
from .engine.attaching import attach as attach_selectors
from .engine.keep import KeepArgument
from .families import check_whole


def attach(
    model: Any,
    selectors: Selectors | str | os.PathLike[str],
    keep: KeepArgument | Keep = None,
    *,
    policy: Policy | str | None = None,
    compile: bool | Mapping[str, Any] = False,
) -> Attachment:
    """Make `model` select its visual tokens in every layer, until the attachment is detached.

        with attach(model, "llava.alvts.safetensors", keep=0.11):
            model.generate(**inputs)

    Args:
        model: a vision-language model of a known family.
        selectors: fitted for this model; or where they are, as `Artifact.from_pretrained` takes it,
            checked against the model.
        keep, policy, compile: see `engine.attaching.attach`.

    Raises:
        AlvtsError: what `engine.attaching.attach`, `Artifact.from_pretrained` and
            `Artifact.check_model` refuse.
    """
    if isinstance(selectors, str | os.PathLike):
        check_whole(model)
        artifact = Artifact.from_pretrained(os.fspath(selectors))
        artifact.check_model(model)
        selectors = artifact
    return attach_selectors(model, selectors, keep, policy=policy, compile=compile)
