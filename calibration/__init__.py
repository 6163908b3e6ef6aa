"""Fitting the selectors of a model, offline, with the model frozen.

1. `capture` runs samples (of `alvts_cli.data`) up to the first decoder layer.
2. `sweep` goes through the layers with one layer's hidden states in memory:
   - the reference `S*` is computed from the layer's real attention (`alvts_cli.engine.probe`),
   - `initialise` starts the factors from a truncated SVD,
   - `align` moves them until the importance they give matches `S*`,
   - recall is measured on samples that were not fitted,
   - `checkpoint` keeps the finished layer, and the layer itself makes the next one's input.
3. `carry` fits what skipped tokens are carried on with, and `policy` tries what keeps the most of
   the model's answers (`answers`).
4. `run` puts it together into an `alvts_cli.artifact.Artifact`; `arguments` checks what it is
   given.

Of fitted selectors, `check` measures whether they serve other weights, and `repick` picks the
policies again; both let the dense model answer first (`asking`).

Nothing in `alvts_cli.engine` knows of this package.
"""

from alvts_cli.data import Reader, Sample, Source, read_data

from .checkpoint import Checkpoint
from .run import Watch, calibrate
from .settings import Settings

__all__ = [
    "Checkpoint",
    "Reader",
    "Sample",
    "Settings",
    "Source",
    "Watch",
    "calibrate",
    "read_data",
]
