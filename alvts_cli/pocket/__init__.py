"""`pocket`: a small LLaVA trained on rendered scenes, shipped with the package.

It is an ordinary `LlavaForConditionalGeneration` folder (see `weights/`), so nothing in the engine
or the commands knows about it; this package holds only its data and its training recipe:

- `scenes`     draws a scene and knows what is in it
- `questions`  asks about a scene, one kind of question per function
- `easy`       reads the public easy-VQA set
- `words`      the closed vocabulary, the tokenizer and the prompt
- `build`      the configuration, the untrained model and the processor
- `vision`     stage 1: patches learn to speak the language model's words
- `joint`      stage 2: everything learns to answer
- `evaluate`   accuracy per question kind, with and without the picture
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the trained model, in `save_pretrained` layout."""
