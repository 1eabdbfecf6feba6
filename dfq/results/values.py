"""Results of the public functions; their fields are those of the command line's JSON."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rich.console import Console
from rich.table import Table

from dfq.results.tables import (
    benchmark_table,
    distill_table,
    evaluate_table,
    field_table,
    quantize_table,
)

WIDTH = 100
"""Width of a result's ``repr`` in characters."""

Share = float
"""A number from 0 to 1; an alias because some classes have a field ``float``."""


Metric = Literal["top1", "threshold", "cosine"]
"""How agreement is measured.

``top1``: the share of images with the same top-1 class.  ``threshold``, of models with one
logit: the share of images whose logits are on the same side of a threshold.  ``cosine``, of
models without a classifier: the mean cosine of the pooled features.
"""


class Result:
    """Base of results, displayed as the command line's table, also in notebooks."""

    _tables: ClassVar[dict[type, Callable[[dict[str, Any]], Table]]] = {}

    def __init_subclass__(cls, *, table: Callable[[dict[str, Any]], Table]) -> None:
        cls._tables[cls] = table

    def table(self) -> Table:
        """Return the table that the command line prints."""
        return self._tables[type(self)](to_json(self))

    def __repr__(self) -> str:
        return self._console().export_text().rstrip()

    def _repr_html_(self) -> str:
        return self._console().export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _console(self) -> Console:
        console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
        console.print(type(self).__name__, self.table(), sep="\n")
        return console


@dataclass(frozen=True)
class CalibrationSource:
    """Source of the calibration set.

    ``cached``: True if it was made by an earlier run; None for images given by the caller.
    """

    method: str
    images: int
    path: str
    cached: bool | None


@dataclass(frozen=True)
class Seconds:
    """Wall-clock time of each stage in seconds."""

    load: float
    invert: float
    calibrate: float
    quantize: float
    evaluate: float
    total: float


@dataclass(frozen=True)
class Bytes:
    """Sizes of the models in bytes.

    ``float``: 4 bytes per parameter.  ``quantized``: size of model.safetensors.
    """

    float: int
    quantized: int


@dataclass(frozen=True)
class FloatQuantized:
    """A share from 0 to 1 for the float and the quantized model.

    For the quantized model: ``correct`` of ``images``, and the 95 % ``interval`` (low, high).
    """

    float: Share | None
    quantized: Share
    correct: int
    images: int
    interval: list[Share]


@dataclass(frozen=True)
class AgreementOn:
    """Agreement with the float model, and what it was measured on.

    ``data`` is the evaluation data's name, ``"inverted"`` for freshly inverted images that
    calibration did not see, or ``"fractal noise"``.

    ``metric``: ``top1``, the share of images with the same top-1 class; ``threshold``, of models
    with one logit, the share of images whose logits are on the same side of ``threshold``;
    ``cosine``, of models without a classifier, the mean cosine of the pooled features.
    ``agreeing``: number of images that agree; ``interval``: 95 % interval (low, high).

    ``kl`` is the mean Kullback-Leibler divergence from the float model in nats, None for
    ``cosine``; ``error_over_spread``: root mean square of the outputs' difference, divided by the
    standard deviation of the float outputs.  ``not_finite``: number of images with a NaN or
    infinite output.  Agreement and error are None if the float outputs are the same for all images.
    """

    data: str
    images: int
    metric: str
    kl: float | None
    agreement: float | None
    agreeing: int | None
    interval: list[float] | None
    threshold: float | None
    error_over_spread: float | None
    not_finite: int


@dataclass(frozen=True)
class GateCheck:
    """Check of a bound that the caller set for ``what``: ``agreement`` or ``accuracy``.

    ``passed``: the lower end of the value's 95 % ``interval`` is not below the bound.
    """

    what: str
    value: float | None
    interval: list[float] | None
    bound: float
    passed: bool


@dataclass(frozen=True)
class LayerSqnr:
    """Signal-to-quantization-noise ratios (SQNR) of a layer's output in decibels.

    ``weights``: only the weights are quantized; ``activations``: only the input; ``both``: both.
    The input is the float model's, so errors of earlier layers do not count.
    """

    name: str
    weights: float
    activations: float
    both: float


@dataclass(frozen=True)
class BlockLoss:
    """Squared error of a block on held-out images, relative to its output's energy, before and
    after reconstruction."""

    name: str
    before: float
    after: float


@dataclass(frozen=True, repr=False)
class QuantizeResult(Result, table=quantize_table):
    """Result of :func:`dfq.quantize`; ``layers`` are measured on images of the calibration
    set.

    ``agreement_outside`` is measured where there is no evaluation data, on images made without
    the model.  ``class_order`` says where labels' indices are from: ``imagenet synsets``,
    ``number``, ``name`` or ``class map`` of class folders, ``y`` of an array; None without
    labels.  ``gate`` holds the bounds that were set, ``warnings`` reasons to distrust the
    rest, and what this processor is slow at.
    """

    model: str
    scheme: str
    checkpoint: str
    calibration: CalibrationSource
    seconds: Seconds
    bytes: Bytes
    agreement: float | None
    accuracy: FloatQuantized | None
    accuracy_top5: FloatQuantized | None
    agreement_on: AgreementOn | None
    attention: str
    layers: list[LayerSqnr]
    blocks: list[BlockLoss] = field(default_factory=list)
    agreement_outside: AgreementOn | None = None
    class_order: str | None = None
    gate: list[GateCheck] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class InvertResult(Result, table=field_table):
    """Result of :func:`dfq.invert`."""

    model: str
    method: str
    images: int
    path: str
    cached: bool
    seconds: float
    bytes: int


@dataclass(frozen=True, repr=False)
class EvaluateResult(Result, table=evaluate_table):
    """Result of :func:`dfq.evaluate`; agreement and float accuracy are None without a
    float model, accuracies without labels or a classifier.  ``metric`` as in
    :class:`AgreementOn`, ``class_order``, ``gate`` and ``warnings`` as in
    :class:`QuantizeResult`."""

    checkpoint: str
    model: str
    scheme: str
    data: str
    images: int
    agreement: float | None
    metric: str
    kl: float | None
    accuracy: FloatQuantized | None
    accuracy_top5: FloatQuantized | None
    backend: str
    seconds: float
    images_per_second: float
    agreement_on: AgreementOn | None = None
    class_order: str | None = None
    gate: list[GateCheck] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TeacherStudent:
    """A share from 0 to 1 for the teacher and the student; of the student's, the 95 %
    ``interval`` (low, high)."""

    teacher: Share
    student: Share
    interval: list[Share]


@dataclass(frozen=True, repr=False)
class DistillResult(Result, table=distill_table):
    """Result of :func:`dfq.distill`.

    ``start`` says whose weights the student began with, ``teacher`` or ``random``.  ``losses`` are
    means over equal stretches of the training.  ``accuracy`` (top-1) and ``agreement`` with the
    teacher are None without evaluation data of ``images`` images, ``accuracy`` also without
    labels.  ``class_order`` and ``warnings`` as in :class:`QuantizeResult`.
    """

    teacher: str
    student: str
    start: str
    parameters: int
    data: CalibrationSource
    path: str
    losses: list[float]
    accuracy: TeacherStudent | None
    agreement: Share | None
    images: int | None
    seconds: float
    training_seconds: float
    agreement_on: AgreementOn | None = None
    class_order: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class ExportResult(Result, table=field_table):
    """Result of :func:`dfq.export`.

    ``products``: number of matrix products with quantized inputs; ``integer_products``: how many
    of them OpenVINO runs on 8-bit integers here.  None if not measured.  ``warnings``: processors
    on which the file gives other results.
    """

    checkpoint: str
    model: str
    scheme: str
    attention: str
    format: str
    weights: str
    path: str
    bytes: int
    products: int | None
    integer_products: int | None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BenchmarkRow:
    """Speed of one runtime: latency of a batch in milliseconds, throughput over all calls.

    ``calls``: number of calls that were counted.  ``warm``: False if the time limit left room for
    the first call only.
    """

    runtime: str
    batch: int
    images_per_second: float
    median_ms: float
    p95_ms: float
    calls: int = 0
    warm: bool = True


@dataclass(frozen=True)
class SkippedRuntime:
    """Runtime that was not measured, with the reason; ``batch``: at this batch size only."""

    runtime: str
    reason: str
    batch: int | None = None


@dataclass(frozen=True)
class ColdStart:
    """Cold start: seconds from the start of a process to its first prediction, and peak memory."""

    runtime: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, repr=False)
class BenchmarkResult(Result, table=benchmark_table):
    """Result of :func:`dfq.benchmark`.

    ``seconds``: time limit of each row.  ``absent``: runtimes that were not measured.  ``cold``:
    None unless requested.  ``instructions``: those of the processor; ``isa``: those that kernels
    ran on, by library (:func:`dfq.environment.isa`).  ``saved``: by batch size, the runtime that
    ``dfq.load`` uses from now on; None unless requested.  ``stopped``: why measurements are
    missing, None if none are.
    """

    checkpoint: str
    model: str
    scheme: str
    attention: str
    backend: str
    rows: list[BenchmarkRow]
    absent: list[SkippedRuntime]
    cold: list[ColdStart] | None
    threads: int
    seconds: float
    processor: str
    instructions: list[str]
    cores: int
    versions: dict[str, str]
    device: str = "cpu"
    isa: dict[str, str] = field(default_factory=dict)
    saved: dict[int, str] | None = None
    stopped: str | None = None


def to_json(result: Any) -> dict[str, Any]:
    """Convert a result to nested dicts of JSON types."""
    return dataclasses.asdict(result)
