"""Checkpoints as engines' files in the cache: exported once, verified by every process that opens
them.

``engines/DIGEST/ENGINE-KEY/`` holds the files and ``entry.json`` with their SHA-256 and the
checkpoint's name and path.  DIGEST is the checkpoint's; KEY also stands for its settings and the
versions of dfq and the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfq import checkpoint as checkpoints
from dfq._version import __version__
from dfq.cache import cache_directory
from dfq.checkpoint import CheckpointInfo
from dfq.device import multiplies_bfloat16
from dfq.engines.inputs import random_images
from dfq.engines.sessions import Engine, ModelFacts, Predict
from dfq.errors import CheckpointError, OutputError, SettingError
from dfq.files import read_json, sha256, sha256_once, write_json
from dfq.ownership import DirectoryFormat, remove_directory, replaced_directory

ENTRY, FORMAT, FORMAT_VERSION = "entry.json", "dfq-engine", 1
BFLOAT16_BOUND = 2.0
"""How much farther from PyTorch's logits those of an engine may be in bfloat16 than in float32."""

PROBE_IMAGES = 8

LARGEST_WEIGHT = 128
"""Largest magnitude of 8-bit integers."""

SHORT = 32
"""Hexadecimal digits of a digest in names of directories."""


@dataclass(frozen=True)
class EngineModelFiles:
    """A checkpoint for an engine; files are written to the cache when they are first needed.

    ``digest``: the checkpoint's, as :func:`dfq.checkpoint.verified_digest` returns it; its
    directory is read only to write the files.
    """

    checkpoint: Path
    digest: str
    info: CheckpointInfo
    engine: Engine
    cache: Path | None

    def open(self, threads: int) -> tuple[Predict, ModelFacts]:
        """Open the model with a number of threads; return it with its facts.

        Raises:
            ExtraError: the engine is not installed.
            SettingError: its products would saturate on this processor.
            CheckpointError: the checkpoint is damaged.
            OutputError: the cache cannot be written.
        """
        directory, facts = self.prepare()
        reason = self.engine.unsupported_reason(facts)
        if reason is not None:
            raise SettingError(f"runtime {self.engine.name!r} is not exact here: {reason}")
        return self.engine.open(directory, threads, facts), facts

    def prepare(self) -> tuple[Path, ModelFacts]:
        """Return the directory of the files, and the model's facts; write it if it is
        missing or damaged."""
        version = self.engine.require()
        directory = self._directory(version)
        facts = _read(directory, self.engine)
        if facts is None:
            facts = self._write(directory)
            self._remove_older(directory)
        return directory, facts

    def _directory(self, version: str) -> Path:
        settings = asdict(self.info.recipe.quantization)
        identity = [FORMAT_VERSION, __version__, self.engine.name, version, settings]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        place = checkpoint_directory(self.digest, self.cache)
        return place / f"{self.engine.name}-{key[:SHORT]}"

    def _write(self, directory: Path) -> ModelFacts:
        try:
            with replaced_directory(directory, entry_format(self.engine)) as new:
                return self._export(new)
        except OutputError as error:
            facts = _read(directory, self.engine)  # another process may have been faster
            if facts is not None:
                return facts
            raise OutputError(f"{error.facts} Name one with cache or $DFQ_CACHE.") from error

    def _export(self, directory: Path) -> ModelFacts:
        from dfq.exporting.formats import export

        if checkpoints.verified_digest(self.checkpoint) != self.digest:
            raise CheckpointError(
                f"{str(self.checkpoint)!r} is another checkpoint than the one that was loaded. "
                "Load it again with dfq.load."
            )
        export(self.checkpoint, format=self.engine.format, out=directory / self.engine.files[0])
        model = checkpoints.load(self.checkpoint)
        facts = ModelFacts(model.max_weight(), model.scheme.integer_attention)
        if self.engine.bfloat16 and multiplies_bfloat16(torch.device("cpu")):
            facts = replace(facts, bfloat16=self._bfloat16_is_close(directory, facts, model))
        entry = {
            "format": FORMAT,
            "model": self.info.model,
            "checkpoint": str(self.checkpoint),
            "facts": asdict(facts),
            "sha256": {name: sha256(directory / name).hexdigest() for name in self.engine.files},
        }
        write_json(directory / ENTRY, entry)
        return facts

    def _bfloat16_is_close(
        self, directory: Path, facts: ModelFacts, model: Callable[[Tensor], Tensor]
    ) -> bool:
        """Whether the engine is as close to PyTorch in bfloat16 as in float32, but for a factor of
        :data:`BFLOAT16_BOUND`, on random images."""
        threads = torch.get_num_threads()
        images = random_images(self.info.arch, self.info.preprocessing, PROBE_IMAGES)
        expected = model(images).numpy()
        narrow, wide = (
            self.engine.open(directory, threads, replace(facts, bfloat16=bfloat16))(images.numpy())
            for bfloat16 in (True, False)
        )
        bound = BFLOAT16_BOUND * np.linalg.norm(wide - expected)
        return bool(np.linalg.norm(narrow - expected) <= bound)

    def _remove_older(self, directory: Path) -> None:
        """Remove the files of other versions; models that use them write them again if need be."""
        for other in directory.parent.glob(f"{self.engine.name}-*"):
            if other != directory and other.is_dir():
                with contextlib.suppress(OutputError):
                    remove_directory(other, entry_format(self.engine))


def entry_format(engine: Engine) -> DirectoryFormat:
    """Return the format of an entry, which its place in the cache marks."""
    names = "|".join(map(re.escape, (ENTRY, *engine.files)))
    return DirectoryFormat(f"an entry of {engine.name}", re.compile(names))


def engines_directory(cache: Path | None) -> Path:
    """Return the directory in the cache of all engines' files."""
    return cache_directory(cache) / "engines"


def checkpoint_directory(digest: str, cache: Path | None) -> Path:
    """Return the directory in the cache for a checkpoint's engines."""
    return engines_directory(cache) / digest[:SHORT]


def read_entry(directory: Path) -> dict[str, Any]:
    """Return the content of ``entry.json``; empty if there is none, or another file."""
    try:
        entry = read_json(directory / ENTRY)
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) and entry.get("format") == FORMAT else {}


def is_whole(directory: Path, entry: dict[str, Any], names: Collection[str]) -> bool:
    """Whether an entry is of these files, and they have its SHA-256."""
    recorded = entry.get("sha256")
    try:
        return (
            isinstance(recorded, dict)
            and set(recorded) == set(names)
            and all(sha256_once(directory / n).hexdigest() == recorded[n] for n in names)
        )
    except OSError:
        return False


def _read(directory: Path, engine: Engine) -> ModelFacts | None:
    """Return the facts of an entry, None unless all of its files are whole."""
    entry = read_entry(directory)
    try:
        facts = _facts(entry["facts"])
    except (KeyError, TypeError, ValueError):
        return None
    return facts if is_whole(directory, entry, engine.files) else None


def _facts(recorded: Any) -> ModelFacts:
    """Check the facts of an entry; raise ValueError or TypeError if they are none of a model."""
    facts = ModelFacts(**recorded)
    if type(facts.max_weight) is not int or not 1 <= facts.max_weight <= LARGEST_WEIGHT:
        raise ValueError(f"max_weight is {facts.max_weight!r:.80}")
    for value in (facts.integer_attention, facts.bfloat16):
        if type(value) is not bool:
            raise ValueError(f"{value!r:.80} is neither true nor false")
    return facts
