"""How pocket was trained. No part of the wheel: whoever trains it has the source tree.

- `train`     the recipe: three phases, resumable
- `examples`  a picture with its questions, as tensors, and what shows on each of its patches
- `segments`  the questions of a batch, each a row of tokens
- `packed`    all questions about a picture in one sequence
- `vision`    what makes patches speak the language model's words
"""
