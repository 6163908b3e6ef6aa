"""One command in several processes, as `torchrun` and `accelerate launch` start them.

Each process takes its share of the work and all hear what came of it; the first one writes and
prints. `accelerate` finds out what was started, and on what; without several processes, nothing of
it is loaded.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .errors import AlvtsError

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process among those of the command.

    Attributes:
        rank: from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether a piece of work is this process's."""
        return number % self.size == self.rank

    def number(self, own: int) -> int:
        """Of this process's piece `own`, from 0, among those of all."""
        return own * self.size + self.rank

    def by_first(self, work: Callable[[], object]) -> None:
        """Let the first process do it; no process goes on before it is done."""
        if self.first:
            work()
        self.gather([self.rank])

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, those of the first one first; the same list in each.

        All processes have to call it, and wait for each other here.
        """
        if self.size == 1:
            return items
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object(items)
        return gathered


def join(device: str) -> Group:
    """The group that this process was started in; of one where it was started by itself.

    Args:
        device: as `--device` says; "cpu" keeps the processes off the GPUs.

    Raises:
        AlvtsError: there are several processes, but `accelerate` is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Group()
    try:
        from accelerate import PartialState
    except ImportError:
        raise AlvtsError(
            "several processes need the accelerate package: pip install 'alvts[scale]'"
        ) from None
    state = PartialState(cpu=device == "cpu")
    return Group(state.process_index, state.num_processes)
