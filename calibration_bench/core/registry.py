"""Which experiments there are, and what one is made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dfq.errors import UsageError, nearest

Row = dict[str, Any]
"""One measurement: JSON values by column."""

Key = dict[str, Any]
"""The settings that decide a row; rows of equal keys are the same measurement."""


class Notes(Protocol):
    """Where an experiment says what it is doing."""

    def note(self, text: str) -> None:
        """A line for people."""


@dataclass(frozen=True)
class Bench:
    """What an experiment is given besides its options: a place for files, and a voice."""

    results: Path
    notes: Notes


@dataclass(frozen=True)
class Measured:
    """A row and its key; an incomplete one is stored, shown, and measured again later."""

    key: Key
    row: Row
    complete: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of a report; ``columns`` maps a key of the rows to how it is written.

    ``note`` says below it what a reader has to know to read it right.
    """

    title: str
    columns: dict[str, str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Points of a plot with a name, and half the length of their error bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """A picture of curves; ``name`` becomes that of its file."""

    name: str
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    lines: bool = True


def no_plots(_: list[Row]) -> list[Plot]:
    """Of an experiment that has none."""
    return []


@dataclass(frozen=True)
class Experiment:
    """What a module of ``calibration_bench.experiments`` exports as ``EXPERIMENT``.

    ``options`` is a dataclass whose fields become options of the command line; ``plan``
    lists the keys of all rows that options ask for; ``measure`` yields those missing as
    they are done; ``tables`` and ``plots`` render stored rows and read nothing else.
    """

    options: type[Any]
    plan: Callable[[Any, Bench], list[Key]]
    measure: Callable[[Any, list[Key], Bench], Iterator[Measured]]
    tables: Callable[[list[Row]], list[Table]]
    plots: Callable[[list[Row]], list[Plot]] = no_plots


@dataclass(frozen=True)
class Entry:
    """An experiment as ``list`` shows it, without importing it.

    ``in_all``: ``run all`` runs it, with its defaults; ``alone``: nothing else beside it, as
    it measures speed.
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
        "Seconds and memory an image: dfq beside the official code of SMI",
        "official rows: a checkout of Egg-Hu/SMI (--official DIR)",
        in_all=False,
    ),
    Entry(
        "inversion-floor",
        "How far an iteration is from what this processor could do, and where the rest goes",
        "nothing",
        in_all=False,
    ),
    Entry(
        "inversion-quality",
        "Accuracy after quantization over inversion effort: where each method's knee is",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "calibration-sources",
        "Accuracy by calibration source, image count and width, alone and with coverage",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "rebirth",
        "What re-birth is worth: PRI beside controls of equal patch updates",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "evolution",
        "What evolves along a trajectory: confidence, features, attention, loss; pictures",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "image-statistics",
        "Kept patches against DMI's, activations against real images', stability of rankings",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "across-models",
        "Seconds an image of PRI, SMI and DMI on models of all sizes and kinds",
        "nothing",
        alone=True,
    ),
    Entry(
        "gpu-check",
        "What dfq makes of a GPU: iterations as graphs, GPTQ, inversion and quantization",
        "a GPU, or --device cpu --tiny; official rows: a checkout of Egg-Hu/SMI (--official DIR)",
        in_all=False,
    ),
    Entry(
        "knowledge-transfer",
        "What students learn from images of each method: by count, by time, from one class",
        "a model with weights and labeled images; the demo has both",
    ),
    Entry(
        "quantization-accuracy",
        "Accuracy by calibration source, and what each ingredient of quantization is worth",
        "a model with weights and labeled images; the demo has both",
    ),
)


def entry(name: str) -> Entry:
    """The experiment of that name.

    Raises:
        UsageError: there is none.
    """
    known = {e.name: e for e in ENTRIES}
    if name not in known:
        raise UsageError(
            f"No experiment is called {name!r}; there are {', '.join(known)}.{nearest(name, known)}"
        )
    return known[name]
