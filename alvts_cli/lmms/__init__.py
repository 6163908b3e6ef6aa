"""alvts as a model of lmms-eval: `lmms-eval --model alvts --model_args pretrained=...`.

lmms-eval finds `manifest` through its entry-point group `lmms_eval.models`. It asks every plugin at
every start, whatever model is wanted, so nothing heavy is imported here; the model itself is in
`model`.
"""

from typing import Any


def manifest() -> Any:
    """Under what name lmms-eval knows the model, and where its class is.

    Messages only: they say where in a question its pictures stand, and lmms-eval makes them for
    tasks that define none.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="alvts", chat_class_path="alvts_cli.lmms.model.Alvts")
