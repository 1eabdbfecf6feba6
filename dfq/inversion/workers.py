"""Several processes that share the units of work of one dataset, started by ``torchrun``."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

TIMEOUT = datetime.timedelta(days=7)
"""How long a worker waits for the others; ``torchrun`` stops all when one dies."""


class Workers:
    """The processes of a run: one alone, or all that ``torchrun`` started.

    They exchange nothing but the news that a stage is over; units of work depend on the
    settings alone, so it does not matter who makes which.
    """

    def __init__(self) -> None:
        if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=TIMEOUT)
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this process prepares and finishes what only one may."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the work."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.size > 1:
            dist.barrier()
