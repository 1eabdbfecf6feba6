"""List of the experiments, and the types that they are made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dfq.errors import UsageError, nearest

Row = dict[str, Any]
"""Measured JSON values by column."""

Key = dict[str, Any]
"""Settings that identify a row; rows with equal keys repeat the same measurement."""


class Notes(Protocol):
    """Receiver of progress messages."""

    def note(self, text: str) -> None:
        """Show a line."""


@dataclass(frozen=True)
class Bench:
    """Context of an experiment: the directory of the results, and the progress messages."""

    results: Path
    notes: Notes


@dataclass(frozen=True)
class Measured:
    """Measured row with its key; an incomplete row is stored, shown, and measured again later."""

    key: Key
    row: Row
    complete: bool = True


@dataclass(frozen=True)
class Table:
    """Table of a report; ``columns`` maps keys of the rows to headings.

    ``note``: explanation below the table.
    """

    title: str
    columns: dict[str, str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Named curve of a plot; ``error``: half the length of the error bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """Plot of curves; ``name``: file name without suffix."""

    name: str
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    lines: bool = True


def no_plots(_: list[Row]) -> list[Plot]:
    """Return no plots."""
    return []


@dataclass(frozen=True)
class Experiment:
    """Experiment, exported by a module of ``calibration_bench.experiments`` as ``EXPERIMENT``.

    ``options``: dataclass whose fields become options of the command line.  ``plan``: lists the
    keys of all rows for given options.  ``measure``: yields the rows of the missing keys.
    ``tables``, ``plots``: render stored rows and read nothing else.
    """

    options: type[Any]
    plan: Callable[[Any, Bench], list[Key]]
    measure: Callable[[Any, list[Key], Bench], Iterator[Measured]]
    tables: Callable[[list[Row]], list[Table]]
    plots: Callable[[list[Row]], list[Plot]] = no_plots


@dataclass(frozen=True)
class Entry:
    """Description of an experiment, known without importing it.

    ``line``: its question.  ``needs``: its requirements.  ``in_all``: part of ``run all``.
    ``alone``: measures speed, so nothing else may run at the same time.
    """

    name: str
    line: str
    needs: str
    in_all: bool = True
    alone: bool = False

    def load(self) -> Experiment:
        module = f"calibration_bench.experiments.{self.name.replace('-', '_')}.experiment"
        experiment: Experiment = importlib.import_module(module).EXPERIMENT
        return experiment


ENTRIES = (
    Entry(
        "inversion-speed",
        "Time and memory per image: dfq compared with the official code of SMI",
        "for official rows a checkout of Egg-Hu/SMI (--official DIR)",
        in_all=False,
    ),
    Entry(
        "inversion-floor",
        "Time of an iteration compared with the processor's limits, by operator group",
        "nothing",
        in_all=False,
    ),
    Entry(
        "inversion-quality",
        "Accuracy after quantization over inversion time, and each method's knee",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "calibration-sources",
        "Accuracy by calibration source, number of images and bits, with and without augmentation",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "rebirth",
        "Ablation of re-birth: PRI compared with controls at equal patch updates",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "evolution",
        "Trajectories by stage: confidence, features, attention, loss, pictures",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "image-statistics",
        "Patches compared with DMI, activations with real images, stability of rankings",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "across-models",
        "Seconds per image of PRI, SMI and DMI on models of all sizes and families",
        "nothing",
        alone=True,
    ),
    Entry(
        "gpu-check",
        "Check of a GPU: CUDA graphs, GPTQ, inversion and quantization",
        "a GPU, or --device cpu --tiny; for official rows a checkout of Egg-Hu/SMI",
        in_all=False,
    ),
    Entry(
        "knowledge-transfer",
        "Accuracy of students by source of their images: by count, by time, from one class",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "quantization-accuracy",
        "Accuracy by calibration source, and ablation of the quantization settings",
        "a model with weights and labeled images; the demo has both",
    ),
)


def entry(name: str) -> Entry:
    """Return an experiment by name.

    Raises:
        UsageError: there is no experiment of that name.
    """
    known = {e.name: e for e in ENTRIES}
    if name not in known:
        raise UsageError(
            f"No experiment is called {name!r}; there are {', '.join(known)}.{nearest(name, known)}"
        )
    return known[name]
