"""Several processes that share the units of work of one dataset, started by ``torchrun``."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch.distributed as dist

from dfq.argument_names import option
from dfq.errors import SettingError, WorkerError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(days=7)
"""How long a worker waits for the others; ``torchrun`` stops all when one dies."""


def launched_together() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return (
        dist.is_available()
        and dist.is_torchelastic_launched()
        and int(os.environ.get("WORLD_SIZE", "1")) > 1
    )


def check_alone(verb: str, data: str) -> None:
    """Raise :class:`SettingError` if ``torchrun`` started several processes.

    ``data`` is the parameter by which ``verb`` takes a dataset that they made.
    """
    if launched_together():
        raise SettingError(
            f"{verb} runs in one process. Let torchrun share out `dfq invert MODEL --out DIR`, "
            f"then {verb} with {option(data, 'DIR')}."
        )


class Workers:
    """The processes of a run: one alone, or all that ``torchrun`` started.

    They exchange nothing but the news that a stage is over; units of work depend on the
    settings alone, so it does not matter who makes which.  A process group that the caller
    made for purposes of its own is left alone.
    """

    _joined: ClassVar[bool] = False

    def __init__(self) -> None:
        if launched_together() and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=TIMEOUT)
            Workers._joined = True
        self.rank = dist.get_rank() if Workers._joined else 0
        self.size = dist.get_world_size() if Workers._joined else 1

    @property
    def first(self) -> bool:
        """Whether this process prepares and finishes what only one may."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of the work."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Go on when all processes have come here.

        Raises:
            WorkerError: one of them has died.
        """
        if self.size > 1:
            try:
                dist.barrier()
            except RuntimeError as error:
                raise WorkerError(
                    "Another worker has stopped, so this one stops too. What is finished is "
                    "kept: run the same command again and only the rest is made."
                ) from error
