"""Worker processes started by ``torchrun`` that share the units of work of a dataset."""

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
"""Longest wait for other workers; ``torchrun`` stops all when one dies."""


def launched_together() -> bool:
    """Whether ``torchrun`` started this process as one of several."""
    return (
        dist.is_available()
        and dist.is_torchelastic_launched()
        and int(os.environ.get("WORLD_SIZE", "1")) > 1
    )


def check_alone(verb: str, data: str) -> None:
    """Raise :class:`SettingError` if ``torchrun`` started several processes.

    ``data``: parameter by which ``verb`` takes a finished dataset.
    """
    if launched_together():
        raise SettingError(
            f"{verb} runs in one process. Run `dfq invert MODEL --out DIR` under torchrun, then "
            f"{verb} with {option(data, 'DIR')}."
        )


class Workers:
    """Processes of a run: a single one, or all that ``torchrun`` started.

    They only wait for each other between stages: units of work depend on the settings alone, so
    any process may run any of them.  A process group of the caller is not used.
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
        """Whether this process has rank 0, which begins and finishes the dataset."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of the items."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Wait for all processes.

        Raises:
            WorkerError: one of them has died.
        """
        if self.size > 1:
            try:
                dist.barrier()
            except RuntimeError as error:
                raise WorkerError(
                    "Another worker has stopped, so this one stops too. Finished units are "
                    "kept: run the same command again to make the rest."
                ) from error
