"""Scoring and selecting, layer by layer through `torch.compile`, and uncompiled where that fails.

Between two layers a selecting prefill launches many small operators, which a compiler makes few of.
Unlike the whole decoder (see `compiling`) this leaves the layers themselves alone, so it goes with
whatever else runs or watches them. Every layer has a region of its own: it is compiled at the
first prompt, at the first one of another length for all lengths, and then no more. That they are
whole and choose the same tokens is tested on the CPU. **Their speed on a GPU is unmeasured**, so
they are nobody's default.
"""

import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

Region = Callable[..., Any]


class Regions:
    """Runs a function compiled, once for each layer."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """
        Args:
            options: keyword arguments of `torch.compile`.
        """
        self._options = options
        self._compiled: dict[int, Region] = {}
        self._failed = False

    def run(self, region: Region, layer: int, *args: Any) -> Any:
        """What `region(*args)` gives, which may be run twice: again uncompiled, and from then on
        always, with one warning, where compiling fails.

        Args:
            region: a function of a module, the same one in every call.
            layer: number of the layer.
            args: of it.
        """
        if self._failed:
            return region(*args)
        if layer not in self._compiled:
            # Compiled code is kept with the code object, at most so many versions of it.
            assert isinstance(region, types.FunctionType)
            own = types.FunctionType(region.__code__.replace(), region.__globals__)
            self._compiled[layer] = torch.compile(own, fullgraph=True, **self._options)
        try:
            return self._compiled[layer](*args)
        except Exception as error:
            # A compiler fails in any way it likes. What is wrong with the input fails here again.
            result = region(*args)
            self._failed = True
            # What a backend said stands on the second line.
            said = " ".join(str(error).split("\n\n")[0].split())
            warnings.warn(
                f"alvts scores uncompiled, because torch.compile failed: {said}", stacklevel=2
            )
            return result
