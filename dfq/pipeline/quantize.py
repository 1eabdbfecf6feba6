"""``dfq.quantize``: from a float model to a checkpoint, with images on disk between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq import checkpoint as checkpoints
from dfq.arguments import checked
from dfq.cache import cache_directory
from dfq.data.dataset import SparseImageDataset
from dfq.data.images import DenseImages, ImageSource, load_batches
from dfq.device import resolve_device
from dfq.environment import versions
from dfq.errors import CheckpointError, SettingError, nearest
from dfq.files import check_writable, make_directory, safe_name
from dfq.inversion import plan_units
from dfq.inversion.schedule import fit_stages
from dfq.pipeline.calibration_set import (
    augmented,
    calibration_set,
    compare_held_out,
    compare_outside,
    held_out_settings,
)
from dfq.pipeline.comparison import EVALUATION_BATCH, Comparison, compare, dense_batches, metric_of
from dfq.pipeline.evaluate import accuracy_pair, agreement_on, check_measurable, open_evaluation
from dfq.pipeline.workers import check_alone
from dfq.progress import Progress, Silent, note_all, warn
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.diagnosis import layer_sqnr, low_sqnr_warnings
from dfq.quantization.equalization import equalize
from dfq.quantization.reconstruction import reconstruct
from dfq.quantization.scheme import Scheme, layers
from dfq.recipe import METHODS, SECTIONS, InversionSettings, Recipe, given, is_set, make_recipe
from dfq.results.gates import check_bounds, check_shares, doubts, gate
from dfq.results.values import (
    BlockLoss,
    Bytes,
    CalibrationSource,
    LayerSqnr,
    QuantizeResult,
    Seconds,
    to_json,
)
from dfq.runtime import onednn
from dfq.slow import slow_floats, slow_integers
from dfq.vit import ViT
from dfq.vit.load import LoadedModel, load_model, module_name

DIAGNOSIS_BATCH, DIAGNOSIS_BATCHES = 4, 4
"""Images of the calibration set on which every layer is measured: at most 4 times 4."""


@checked
def quantize(
    model: str | nn.Module,
    *,
    bits: int | None = None,
    calibration: str | Path | None = None,
    images: int | None = None,
    iterations: int | None = None,
    stages: int | None = None,
    attention: str | None = None,
    out: str | Path | None = None,
    eval: str | Path | None = None,
    class_map: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    seed: int | None = None,
    threads: int | None = None,
    precision: str | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_range: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a ViT without data and write a checkpoint.

    Args:
        model, weights, num_classes, img_size, in_chans, global_pool, mean, std, input_range: see
            :func:`dfq.load_model`.
        bits: 2 to 8, of the weights; activations have 8 unless a recipe says fewer.
        calibration: ``pri``, ``smi``, ``dmi``, ``noise``, or the path of a sparse-image
            dataset, an image folder or an ``.npz``.
        images: size of the calibration set.
        iterations, stages, seed, threads, precision: of the inversion; see
            :func:`dfq.invert`.
        attention: ``float`` or ``int8``.
        out: directory of the checkpoint; ``./MODEL-w4a8`` by default.  A dfq checkpoint
            there is replaced once the new one is complete.
        eval: images for agreement and, with labels, accuracy; see :func:`dfq.evaluate`.
        class_map: a file that numbers their class folders.
        recipe: a TOML file, the name of a recipe that ships with dfq, or a
            :class:`dfq.Recipe`; the arguments override it.
        settings: further fields to override, as ``{"inversion": {...}, "quantization":
            {...}}``.
        min_agreement, min_accuracy: bounds from 0 to 1, of the lower ends of 95 % intervals;
            below one the result is refused, though the checkpoint is written.

    Raises:
        GateError: the interval of agreement or accuracy begins below its bound.
        DfqError: one of its other subclasses says what is wrong.
    """
    clock, progress = _Clock(), progress or Silent()
    check_alone("quantize", "--calibration")
    check_shares(min_agreement=min_agreement, min_accuracy=min_accuracy)
    if min_accuracy is not None and eval is None:
        raise SettingError("min_accuracy needs data to measure it on: give eval (--eval DATA).")
    if class_map is not None and eval is None:
        raise SettingError(
            "class_map numbers the class folders of eval: give it too (--eval DATA)."
        )
    method = calibration if isinstance(calibration, str) and calibration in METHODS else None
    inversion = given(
        None,
        method=method,
        images=images,
        iterations=iterations,
        stages=stages,
        seed=seed,
        threads=threads,
        precision=precision,
    )
    chosen = _recipe(recipe, settings, inversion, given(None, bits=bits, attention=attention))
    target = resolve_device(device)
    slow = _slow(chosen, target, _inverts(chosen, calibration, eval))
    warn(progress, slow)
    name = model if isinstance(model, str) else module_name(model)
    scheme = Scheme(chosen.quantization).name
    out = Path(out) if out is not None else Path(f"{safe_name(name)}-{scheme}")
    checkpoints.check_output(out)
    check_writable(out.parent)
    _note_replaced(out, name, scheme, progress)
    with clock("load"):
        loaded = load_model(
            model,
            weights=weights,
            num_classes=num_classes,
            img_size=img_size,
            in_chans=in_chans,
            global_pool=global_pool,
            mean=mean,
            std=std,
            input_range=input_range,
        )
        note_all(progress, loaded.notes)
        vit = loaded.vit.to(target)
        Scheme(chosen.quantization).check_layers(vit.arch)
        patches, metric = vit.arch.grid.patches, metric_of(vit.arch)
        if not is_set("stages", stages, (settings or {}).get("inversion"), recipe):
            chosen = dataclasses.replace(chosen, inversion=fit_stages(chosen.inversion, patches))
        measured_on: ImageSource | InversionSettings
        if eval is not None:
            measured_on = open_evaluation(eval, vit.arch, loaded.preprocessing, class_map)
            check_measurable(measured_on, metric, min_agreement, min_accuracy, "--eval")
        else:
            measured_on = held_out_settings(chosen.inversion, patches, metric, min_agreement)
            plan_units(measured_on, patches)
    if eval is None:
        make_directory(cache_directory(cache) / "datasets")
    with clock("invert"):
        source, origin = calibration_set(
            loaded, chosen, None if method else calibration, target, cache, progress, images
        )
    quantized, noise, losses = _quantized(loaded, vit, source, chosen, clock, progress)
    result = QuantizeResult(
        model=name,
        scheme=scheme,
        checkpoint=str(out),
        calibration=origin,
        seconds=clock.seconds(),
        bytes=Bytes(4 * sum(p.numel() for p in vit.parameters()), 0),
        agreement=None,
        accuracy=None,
        accuracy_top5=None,
        agreement_on=None,
        attention=chosen.quantization.attention,
        layers=noise,
        blocks=losses,
    )
    result = _save(result, out, quantized, loaded, _as_made(chosen, source, origin))
    with clock("evaluate"):
        result = _measured(result, loaded, quantized, measured_on, target, cache, progress)
    doubtful = [
        *low_sqnr_warnings(noise, quantized.scheme),
        *doubts(result.agreement_on, result.agreement_outside),
    ]
    result = dataclasses.replace(
        result,
        seconds=clock.seconds(),
        gate=check_bounds(result.agreement_on, result.accuracy, min_agreement, min_accuracy),
        warnings=[*slow, *doubtful],
    )
    checkpoints.write_report(out, to_json(result))
    warn(progress, doubtful)
    gate(result)
    return result


def _inverts(recipe: Recipe, calibration: str | Path | None, eval: str | Path | None) -> bool:
    """Whether images are inverted, to calibrate on or to measure agreement on."""
    made = calibration is None or calibration in METHODS
    return eval is None or (made and recipe.inversion.method != "noise")


def _slow(recipe: Recipe, device: torch.device, inverts: bool) -> list[str]:
    """What will be slow: inversion, and the quantized model when it is measured."""
    largest = onednn.MAX_WEIGHT_WITHOUT_VNNI if recipe.quantization.reduce_range else 127
    floats = slow_floats(device, recipe.inversion.precision) if inverts else []
    return [*floats, *slow_integers(device, largest)]


def _measured(
    result: QuantizeResult,
    loaded: LoadedModel,
    quantized: QuantizedViT,
    data: ImageSource | InversionSettings,
    device: torch.device,
    cache: str | Path | None,
    progress: Progress,
) -> QuantizeResult:
    """The result with what was measured on the caller's images, or on images of dfq's making."""
    outside = None
    if isinstance(data, InversionSettings):
        name, class_order = "inverted", None
        comparison = compare_held_out(loaded, quantized, data, device, cache, progress)
        outside = agreement_on(compare_outside(loaded, quantized, progress), "fractal noise")
    else:
        name, class_order = data.name, data.class_order
        comparison = _compare_on(data, loaded, quantized, device, progress)
    accuracy = accuracy_pair(comparison, "top1")
    return dataclasses.replace(
        result,
        agreement=comparison.agreement,
        accuracy=accuracy,
        accuracy_top5=accuracy_pair(comparison, "top5"),
        agreement_on=agreement_on(comparison, name),
        agreement_outside=outside,
        class_order=None if accuracy is None else class_order,
    )


def _compare_on(
    data: ImageSource,
    loaded: LoadedModel,
    quantized: QuantizedViT,
    device: torch.device,
    progress: Progress,
) -> Comparison:
    batches = dense_batches(load_batches(data, loaded.preprocessing, EVALUATION_BATCH), device)
    with progress.task("Evaluating", len(data)) as advance:
        return compare(quantized, loaded.vit, batches, advance, metric=metric_of(loaded.vit.arch))


def _recipe(
    recipe: str | Path | Recipe | None,
    settings: dict[str, dict[str, Any]] | None,
    inversion: dict[str, Any],
    quantization: dict[str, Any],
) -> Recipe:
    """A recipe with the tables of ``settings`` and a call's own arguments over it."""
    extra = settings or {}
    for section in extra:
        if section not in SECTIONS:
            raise SettingError(
                f"settings has an unknown table {section!r}; known: {', '.join(SECTIONS)}."
                f"{nearest(section, SECTIONS)}"
            )
    made = make_recipe(
        recipe,
        inversion=given(extra.get("inversion"), **inversion),
        quantization=given(extra.get("quantization"), **quantization),
    )
    return dataclasses.replace(made, distillation=None)


def _quantized(
    loaded: LoadedModel,
    vit: ViT,
    source: SparseImageDataset | DenseImages,
    recipe: Recipe,
    clock: _Clock,
    progress: Progress,
) -> tuple[QuantizedViT, list[LayerSqnr], list[BlockLoss]]:
    """The model in integers, calibrated on ``source`` and what is laid beside it; what that
    leaves of every layer's output, and the losses of reconstruction."""
    settings = recipe.quantization
    scheme = Scheme(settings)
    wide = augmented(source, settings)
    with clock("calibrate"), progress.task("Calibrating", len(wide)) as advance:
        batches = wide.batches(settings.batch)
        found = calibrate(vit, batches, loaded.preprocessing, scheme, advance)
    with clock("quantize"):
        with progress.task("Quantizing", len(layers(vit.arch))) as advance:
            equal, found = equalize(vit, found, settings.equalize)
            quantized = quantize_vit(equal, found, loaded.preprocessing, settings, advance)
            del found
        losses: list[BlockLoss] = []
        if settings.reconstruct:
            with progress.task("Reconstructing", vit.arch.depth) as advance:
                batches, seed = wide.batches(settings.batch), recipe.inversion.seed
                losses = reconstruct(equal, quantized, batches, settings.reconstruct, seed, advance)
        diagnosed = islice(source.batches(DIAGNOSIS_BATCH), DIAGNOSIS_BATCHES)
        noise = layer_sqnr(equal, quantized, diagnosed)
    return quantized, noise, losses


def _note_replaced(out: Path, name: str, scheme: str, progress: Progress) -> None:
    """Say that another model's checkpoint, or one of another scheme, will be replaced."""
    if not (out / checkpoints.CONFIG).is_file():
        return
    try:
        info = checkpoints.read_info(out)
    except CheckpointError:
        before = ("a damaged checkpoint", "")
    else:
        before = (info.model, Scheme(info.recipe.quantization).name)
    if before != (name, scheme):
        progress.note(f"{str(out)!r} holds {' '.join(before).strip()}, which will be replaced")


def _as_made(
    recipe: Recipe, source: SparseImageDataset | DenseImages, origin: CalibrationSource
) -> Recipe:
    """The recipe with the inversion settings of a dataset that the caller gave."""
    if origin.cached is not None or not isinstance(source, SparseImageDataset):
        return recipe
    return dataclasses.replace(recipe, inversion=source.inversion or recipe.inversion)


def _save(
    result: QuantizeResult,
    out: Path,
    quantized: QuantizedViT,
    loaded: LoadedModel,
    recipe: Recipe,
) -> QuantizeResult:
    """Write the checkpoint before anything is measured, so that no failure there loses it."""
    calibration = result.calibration
    size = checkpoints.save_checkpoint(
        out,
        quantized,
        name=result.model,
        recipe=recipe,
        source={
            "timm_name": loaded.timm_name,
            "fingerprint": loaded.fingerprint,
            "calibration": {
                "method": calibration.method,
                "images": calibration.images,
                "name": Path(calibration.path).name,
            },
            "versions": versions(),
        },
    )
    saved = dataclasses.replace(result, bytes=Bytes(result.bytes.float, size))
    checkpoints.write_report(out, to_json(saved))
    return saved


class _Clock:
    """Adds up the wall-clock time of named stages."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._spent[stage] = self._spent.get(stage, 0.0) + time.perf_counter() - before

    def seconds(self) -> Seconds:
        stages = {f.name: self._spent.get(f.name, 0.0) for f in dataclasses.fields(Seconds)}
        return Seconds(**{**stages, "total": time.perf_counter() - self._started})
