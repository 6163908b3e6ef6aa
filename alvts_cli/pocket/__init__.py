"""`pocket`: a small LLaVA trained on rendered scenes, shipped with the package.

It is an ordinary `LlavaForConditionalGeneration` folder (see `weights/`), so nothing in the engine
or the commands knows about it; this package holds only its data and its training recipe:

- `scenes`     draws a scene and knows what is in it
- `questions`  asks about a scene, one kind of question per function
- `easy`       reads the public easy-VQA set
- `words`      the closed vocabulary, the tokenizer and the prompt
- `build`      the configuration, the untrained model and the processor
- `evaluate`   accuracy per question kind, with and without the picture
- `notice`     whether a picture and a question are such as it was trained on
- `training`   the recipe; in the source tree alone
"""

from importlib.util import find_spec
from pathlib import Path

from ..errors import AlvtsError

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the trained model, in `save_pretrained` layout."""


def require_training() -> None:
    """Refuse where the recipes of pocket and smol are not there: they are no part of the wheel.

    Raises:
        AlvtsError: they are not.
    """
    if find_spec("alvts_cli.pocket.training") is None:
        raise AlvtsError(
            "training is only in the source tree: clone the repository, and run "
            "python -m alvts_cli there instead of alvts"
        )
