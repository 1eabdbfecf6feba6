"""Choice of the fastest runtime for a checkpoint, measured once and recorded in the cache."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfq._version import __version__
from dfq.device import int8_is_exact
from dfq.engines.entries import checkpoint_directory
from dfq.engines.sessions import ENGINES, TORCH, installed_engines
from dfq.environment import instructions, processor
from dfq.errors import OutputError
from dfq.files import make_directory, read_json, write_json
from dfq.timing import Sampler, interleave

MARGIN = 1.05
"""How much faster than PyTorch an engine must be to be chosen, above the noise of a measurement."""

SECONDS = 3.0
"""Time limit of each runtime's measurement."""

FASTEST = 1e12
"""Images per second above all that are measured."""

FORMAT = "dfq-choice"

Record = dict[int, dict[str, float]]
"""Measured images per second of each runtime, by batch size."""


class Choices:
    """Record of the runtimes that were measured for a checkpoint on this machine.

    It holds for one processor, number of threads and set of versions: with another of them there is
    no record.  ``checkpoint`` is noted in it, for listings.
    """

    def __init__(
        self,
        digest: str,
        cache: str | Path | None,
        threads: int,
        checkpoint: str | Path | None = None,
    ) -> None:
        self._checkpoint = None if checkpoint is None else str(Path(checkpoint).absolute())
        self._directory = checkpoint_directory(digest, None if cache is None else Path(cache))
        self._threads = threads

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        cpu = torch.device("cpu")
        return {
            "processor": processor(),
            "instructions": [*instructions(), f"int8_is_exact={int8_is_exact(cpu)}"],
            "cores": os.cpu_count(),
            "threads": self._threads,
            "versions": {"dfq": __version__, "torch": torch.__version__, **installed_engines()},
        }

    @functools.cached_property
    def _path(self) -> Path:
        content = json.dumps(self._identity, sort_keys=True).encode()
        return self._directory / f"choice-{hashlib.sha256(content).hexdigest()[:32]}.json"

    def read(self) -> Record:
        """Return the record, empty if there is none or it is damaged."""
        return read_record(self._path) if self._directory.is_dir() else {}

    def save(self, batch: int, speeds: Mapping[str, float]) -> None:
        """Record images per second of PyTorch (``torch``) and the engines that were measured.

        Raises:
            OutputError: the cache cannot be written.
        """
        record = {**self.read(), batch: dict(speeds)}
        try:
            make_directory(self._directory)
            measured = {str(n): speeds for n, speeds in record.items()}
            facts = {"format": FORMAT, "checkpoint": self._checkpoint, **self._identity}
            write_json(self._path, {**facts, "measured": measured})
        except OutputError as error:
            raise OutputError(f"{error.facts} Name one with cache or $DFQ_CACHE.") from error

    def recorded(self, batch: int) -> str | None:
        """Return the runtime for a batch size by the record of the nearest one; None without."""
        record = self.read()
        if not record:
            return None
        return fastest(record[min(record, key=lambda n: abs(math.log(n / batch)))])


def read_record(path: Path) -> Record:
    """Return the speeds in a file of a record, empty if there is none or it is damaged."""
    try:
        content = read_json(path)
        measured = content["measured"]
        good = content["format"] == FORMAT and all(
            _is_batch(batch) and _is_speeds(speeds) for batch, speeds in measured.items()
        )
        return {int(batch): speeds for batch, speeds in measured.items()} if good else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_batch(text: str) -> bool:
    """Whether a text is a batch size as :meth:`Choices.save` writes it."""
    return re.fullmatch("[1-9][0-9]{0,9}", text) is not None


def _is_speeds(speeds: Any) -> bool:
    return (
        isinstance(speeds, dict)
        and set(speeds) <= {TORCH, *ENGINES}
        and TORCH in speeds
        and all(type(v) in (int, float) and 0 < v < FASTEST for v in speeds.values())
    )


def fastest(speeds: Mapping[str, float]) -> str:
    """Return the fastest runtime; PyTorch unless an engine is faster by :data:`MARGIN`."""
    best = max(speeds, key=lambda name: speeds[name])
    return best if speeds[best] >= MARGIN * speeds[TORCH] else TORCH


def measure(models: Mapping[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, float]:
    """Return the images per second of models by name, on the same images, in turns.

    Each takes at most :data:`SECONDS`, or one call.
    """
    samplers = {n: Sampler(functools.partial(m, images), SECONDS) for n, m in models.items()}
    interleave(list(samplers.values()), SECONDS, lambda _: None)
    failure = samplers[TORCH].failure
    if failure is not None:
        raise failure
    return {
        name: len(images) / float(np.median(sampler.times))
        for name, sampler in samplers.items()
        if sampler.failure is None
    }
