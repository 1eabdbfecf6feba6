"""The stages of ``dfq.quantize``, each callable alone.

prepare -> make_calibration_set -> calibrate -> round_weights -> reconstruct -> diagnose -> save ->
measure -> report.  Every stage takes a :class:`Plan` and what the stages before it returned.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from dfq import checkpoint as checkpoints
from dfq.arguments import checked
from dfq.cache import cache_directory
from dfq.data.images import ImageSource, load_batches
from dfq.device import resolve_device
from dfq.environment import versions
from dfq.errors import DatasetError, SettingError, nearest
from dfq.files import make_directory, safe_name
from dfq.inversion import plan_units
from dfq.inversion.objective import check_classes
from dfq.inversion.schedule import fit_stages
from dfq.pipeline.calibration_set import (
    CalibrationSet,
    augmented,
    calibration_set,
    compare_held_out,
    compare_outside,
    held_out_settings,
)
from dfq.pipeline.comparison import EVALUATION_BATCH, Comparison, compare, dense_batches, metric_of
from dfq.pipeline.evaluate import accuracy_pair, agreement_on, check_measurable, open_evaluation
from dfq.progress import Progress, Silent, note_all, warn
from dfq.quantization import Calibration, QuantizedViT, quantize_vit
from dfq.quantization.calibration import calibrate as calibrate_vit
from dfq.quantization.calibration import check_calibration
from dfq.quantization.diagnosis import layer_sqnr, low_sqnr_warnings
from dfq.quantization.equalization import equalize
from dfq.quantization.reconstruction import reconstruct as reconstruct_blocks
from dfq.quantization.scheme import Scheme, layers
from dfq.recipe import SECTIONS, InversionSettings, Recipe, is_set, make_recipe
from dfq.results.gates import check_bounds, doubts
from dfq.results.values import (
    AgreementOn,
    BlockLoss,
    Bytes,
    FloatQuantized,
    LayerSqnr,
    QuantizeResult,
    Seconds,
    to_json,
)
from dfq.vit import ViT
from dfq.vit.load import LoadedModel, load_model
from dfq.vit.options import LoadOptions

__all__ = [
    "CalibrationSet",
    "Clock",
    "Measured",
    "Plan",
    "Quantized",
    "calibrate",
    "diagnose",
    "make_calibration_set",
    "make_evaluation_set",
    "measure",
    "prepare",
    "reconstruct",
    "report",
    "round_weights",
    "save",
]

DIAGNOSIS_BATCH, DIAGNOSIS_BATCHES = 4, 4
"""Batch size and largest number of batches of the calibration set on which layers are measured."""


class Clock:
    """Wall-clock time of stages in seconds."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage, a field of :class:`Seconds`."""
        before = time.perf_counter()
        yield
        self._spent[stage] = self._spent.get(stage, 0.0) + time.perf_counter() - before

    def seconds(self) -> Seconds:
        """Return the time of each stage, and the total since the clock was made."""
        stages = {f.name: self._spent.get(f.name, 0.0) for f in dataclasses.fields(Seconds)}
        return Seconds(**{**stages, "total": time.perf_counter() - self._started})


@dataclass(frozen=True)
class Plan:
    """Context of all stages.

    ``model``: the float model on ``device``, frozen.  ``recipe``: all settings.  ``cache``:
    directory of inverted datasets, by default the user's.  ``clock``: time of the stages so far.
    """

    model: LoadedModel
    recipe: Recipe
    device: torch.device
    cache: Path | None = None
    progress: Progress = field(default_factory=Silent, repr=False, compare=False)
    clock: Clock = field(default_factory=Clock, repr=False, compare=False)

    @property
    def scheme(self) -> Scheme:
        """Quantization scheme of every layer."""
        return Scheme(self.recipe.quantization)


@dataclass(frozen=True)
class Quantized:
    """A quantized model and measurements of its layers.

    ``reference``: the float model that it was rounded from, with equalized channels.  ``blocks``:
    losses of reconstruction, by block; ``layers``: SQNRs, by layer.
    """

    model: QuantizedViT
    reference: ViT = field(repr=False)
    blocks: list[BlockLoss] = field(default_factory=list)
    layers: list[LayerSqnr] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """Measurements of a quantized model compared with the float one; None if not measured.

    The fields are those of :class:`dfq.QuantizeResult`.
    """

    agreement: float | None = None
    accuracy: FloatQuantized | None = None
    accuracy_top5: FloatQuantized | None = None
    agreement_on: AgreementOn | None = None
    agreement_outside: AgreementOn | None = None
    class_order: str | None = None


def choose_recipe(
    recipe: str | Path | Recipe | None, settings: dict[str, dict[str, Any]] | None
) -> Recipe:
    """Return a recipe, overridden by the tables of ``settings``.

    Raises:
        RecipeError: the recipe is missing or malformed.
        SettingError: a setting is unknown or out of range.
    """
    tables = settings or {}
    for section in tables:
        if section not in SECTIONS:
            raise SettingError(
                f"settings has an unknown table {section!r}; known: {', '.join(SECTIONS)}."
                f"{nearest(section, SECTIONS)}"
            )
    made = make_recipe(
        recipe, inversion=tables.get("inversion"), quantization=tables.get("quantization")
    )
    return dataclasses.replace(made, distillation=None)


@checked
def prepare(
    model: str | nn.Module | LoadedModel,
    *,
    recipe: str | Path | Recipe | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[LoadOptions],
) -> Plan:
    """Load the model and resolve the settings for it.

    Args:
        model: as for :func:`dfq.load_model`, which takes ``options``; it is not modified.
        recipe: a TOML file, the name of a recipe that ships with dfq, or a :class:`dfq.Recipe`.
        settings: fields that override the recipe's, as ``{"inversion": {...}, "quantization":
            {...}}``.  Unless these or the recipe set ``stages`` of PRI, they are fitted to the
            number of patches and iterations.
        device: where the model is inverted, calibrated and measured.
        cache: directory of inverted datasets.

    Raises:
        DfqError: one of its subclasses says what is wrong.
    """
    clock, progress = Clock(), progress or Silent()
    chosen, target = choose_recipe(recipe, settings), resolve_device(device)
    with clock("load"):
        loaded = load_model(model, **options).frozen(target)
        note_all(progress, loaded.notes)
        Scheme(chosen.quantization).check_layers(loaded.vit.arch)
        check_classes(loaded.vit.arch, chosen.inversion.classes)
        if not is_set("stages", None, (settings or {}).get("inversion"), recipe):
            fitting = fit_stages(chosen.inversion, loaded.vit.arch.grid.patches)
            chosen = dataclasses.replace(chosen, inversion=fitting)
    place = None if cache is None else Path(cache)
    return Plan(loaded, chosen, target, place, progress, clock)


@checked
def make_calibration_set(
    plan: Plan, source: str | Path | None = None, *, images: int | None = None
) -> CalibrationSet:
    """Invert the calibration images, find them in the cache, or open given images.

    Args:
        source: path of a sparse-image dataset (of :func:`dfq.invert` or
            :func:`dfq.write_dataset`), an image folder or an ``.npz``, of which as many images are
            taken as the recipe says; by default images are inverted as the recipe says.
        images: number of images that a sparse-image dataset must have.

    Raises:
        DfqError: one of its subclasses says what is wrong.
    """
    with plan.clock("invert"):
        return calibration_set(
            plan.model, plan.recipe, source, plan.device, plan.cache, plan.progress, images
        )


@checked
def calibrate(plan: Plan, images: CalibrationSet) -> Calibration:
    """Run the images, with the recipe's augmentation, through the float model.

    Returns the ranges and the statistics of every quantized activation.

    Raises:
        DatasetError: there are no images, or they have another grid of patches than the model.
        RunError: an activation is not finite.
    """
    grid = plan.model.vit.arch.grid
    if images.images.grid != grid:
        raise DatasetError(
            f"The calibration images have a grid of {images.images.grid}, the model one of {grid}. "
            "Make the calibration set with this plan."
        )
    settings = plan.recipe.quantization
    wide = augmented(images.images, settings)
    with plan.clock("calibrate"), plan.progress.task("Calibrating", len(wide)) as advance:
        batches = wide.batches(settings.batch)
        return calibrate_vit(
            plan.model.vit, batches, plan.model.preprocessing, plan.scheme, advance
        )


@checked
def round_weights(plan: Plan, calibration: Calibration) -> Quantized:
    """Equalize channels, round weights, correct biases and set the ranges of inputs.

    Raises:
        SettingError: the calibration lacks what the plan's scheme needs, or is of another model.
    """
    vit, settings = plan.model.vit, plan.recipe.quantization
    check_calibration(calibration, vit, plan.scheme)
    names = layers(vit.arch)
    with plan.clock("quantize"), plan.progress.task("Quantizing", len(names)) as advance:
        reference, calibration = equalize(vit, calibration, settings.equalize)
        model = quantize_vit(reference, calibration, plan.model.preprocessing, settings, advance)
        return Quantized(model, reference)


@checked
def reconstruct(plan: Plan, quantized: Quantized, images: CalibrationSet) -> Quantized:
    """Train scales, biases and norms block by block, if the recipe's ``reconstruct`` says so.

    ``quantized.model`` is modified.  See :func:`dfq.quantization.reconstruction.reconstruct`.

    Raises:
        SettingError: there are too few trajectories.
    """
    settings = plan.recipe.quantization
    if not settings.reconstruct:
        return quantized
    batches = augmented(images.images, settings).batches(settings.batch)
    depth, seed = plan.model.vit.arch.depth, plan.recipe.inversion.seed
    with plan.clock("quantize"), plan.progress.task("Reconstructing", depth) as advance:
        losses = reconstruct_blocks(
            quantized.reference, quantized.model, batches, settings.reconstruct, seed, advance
        )
    return dataclasses.replace(quantized, blocks=losses)


@checked
def diagnose(plan: Plan, quantized: Quantized, images: CalibrationSet) -> Quantized:
    """Measure the SQNR of every layer on a few images of the calibration set."""
    few = islice(images.images.batches(DIAGNOSIS_BATCH), DIAGNOSIS_BATCHES)
    with plan.clock("quantize"):
        measured = layer_sqnr(quantized.reference, quantized.model, few)
    return dataclasses.replace(quantized, layers=measured)


@checked
def save(
    plan: Plan, quantized: Quantized, images: CalibrationSet, out: str | Path | None = None
) -> QuantizeResult:
    """Write the checkpoint and its ``report.json``, before any measurement.

    The recipe in it has the inversion settings of the images.

    Args:
        out: directory of the checkpoint; ``./MODEL-w4a8`` by default.  A dfq checkpoint there is
            replaced.

    Raises:
        OutputError: the directory holds something else, or cannot be written.
    """
    model, inversion = plan.model, images.inversion or plan.recipe.inversion
    place = default_place(model.name, plan.scheme) if out is None else Path(out)
    size = checkpoints.save_checkpoint(
        place,
        quantized.model,
        name=model.name,
        recipe=dataclasses.replace(plan.recipe, inversion=inversion),
        source={
            "timm_name": model.timm_name,
            "fingerprint": model.fingerprint,
            "calibration": {
                "method": images.source.method,
                "images": images.source.images,
                "name": Path(images.source.path).name,
            },
            "versions": versions(),
        },
    )
    result = QuantizeResult(
        model=model.name,
        scheme=plan.scheme.name,
        checkpoint=str(place),
        calibration=images.source,
        seconds=plan.clock.seconds(),
        bytes=Bytes(4 * sum(p.numel() for p in model.vit.parameters()), size),
        **vars(Measured()),
        attention=plan.recipe.quantization.attention,
        layers=quantized.layers,
        blocks=quantized.blocks,
        warnings=low_sqnr_warnings(quantized.layers, quantized.model.scheme),
    )
    checkpoints.write_report(place, to_json(result))
    return result


def default_place(name: str, scheme: Scheme) -> Path:
    """Return the default directory of a checkpoint."""
    return Path(f"{safe_name(name)}-{scheme.name}")


@checked
def make_evaluation_set(
    plan: Plan,
    data: str | Path | None = None,
    *,
    class_map: str | Path | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
) -> ImageSource | InversionSettings:
    """Open the images to measure on, or choose the settings to invert them.

    Args:
        data: images as for :func:`dfq.evaluate`; by default :func:`measure` inverts images of
            another seed than the calibration set's.
        class_map: a file that numbers their class folders.
        min_agreement, min_accuracy: bounds from 0 to 1 that the images must be able to decide.

    Raises:
        DataError: the images cannot be used.
        SettingError: they cannot decide a bound.
    """
    arch = plan.model.vit.arch
    metric = metric_of(arch)
    with plan.clock("load"):
        if data is not None:
            source = open_evaluation(data, arch, plan.model.preprocessing, class_map)
            check_measurable(source, metric, min_agreement, min_accuracy, "eval")
            return source
        settings, patches = plan.recipe.inversion, arch.grid.patches
        held_out = held_out_settings(settings, patches, metric, min_agreement)
        plan_units(held_out, patches)
        make_directory(cache_directory(plan.cache) / "datasets")
        return held_out


@checked
def measure(
    plan: Plan,
    quantized: QuantizedViT,
    data: ImageSource | InversionSettings | None = None,
) -> Measured:
    """Compare the quantized model with the float one.

    Args:
        data: what :func:`make_evaluation_set` returned; by default images are inverted.  Beside
            inverted images, agreement is measured on fractal noise.
    """
    on = make_evaluation_set(plan) if data is None else data
    with plan.clock("evaluate"):
        if isinstance(on, InversionSettings):
            return _measure_inverted(plan, quantized, on)
        comparison = _compare_on(plan, quantized, on)
        measured = _measured(comparison, on.name)
        labeled = measured.accuracy is not None
        return dataclasses.replace(measured, class_order=on.class_order if labeled else None)


def _measure_inverted(plan: Plan, quantized: QuantizedViT, settings: InversionSettings) -> Measured:
    comparison = compare_held_out(
        plan.model, quantized, settings, plan.device, plan.cache, plan.progress
    )
    outside = compare_outside(plan.model, quantized, plan.progress)
    return dataclasses.replace(
        _measured(comparison, "inverted"), agreement_outside=agreement_on(outside, "fractal noise")
    )


def _measured(comparison: Comparison, name: str) -> Measured:
    return Measured(
        agreement=comparison.agreement,
        accuracy=accuracy_pair(comparison, "top1"),
        accuracy_top5=accuracy_pair(comparison, "top5"),
        agreement_on=agreement_on(comparison, name),
    )


def _compare_on(plan: Plan, quantized: QuantizedViT, data: ImageSource) -> Comparison:
    vit, preprocessing = plan.model.vit, plan.model.preprocessing
    batches = dense_batches(load_batches(data, preprocessing, EVALUATION_BATCH), plan.device)
    with plan.progress.task("Evaluating", len(data)) as advance:
        return compare(quantized, vit, batches, advance, metric=metric_of(vit.arch))


@checked
def report(
    plan: Plan,
    result: QuantizeResult,
    measured: Measured,
    *,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    warnings: Sequence[str] = (),
) -> QuantizeResult:
    """Add measurements to the result of :func:`save`, and write it as ``report.json`` again.

    Args:
        min_agreement, min_accuracy: bounds whose verdicts become ``gate``.
        warnings: go before those about the layers and the measurements.
    """
    doubtful = [*result.warnings, *doubts(measured.agreement_on, measured.agreement_outside)]
    result = dataclasses.replace(
        result,
        **vars(measured),
        seconds=plan.clock.seconds(),
        gate=check_bounds(measured.agreement_on, measured.accuracy, min_agreement, min_accuracy),
        warnings=[*warnings, *doubtful],
    )
    checkpoints.write_report(Path(result.checkpoint), to_json(result))
    warn(plan.progress, doubtful)
    return result
