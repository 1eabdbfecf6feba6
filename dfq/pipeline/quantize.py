"""``dfq.quantize``: from a float model by way of images on disk to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from dfq import checkpoint as checkpoints
from dfq.argument_names import option
from dfq.arguments import checked
from dfq.data.images import ImageSource
from dfq.device import resolve_device
from dfq.errors import CheckpointError, SettingError
from dfq.files import check_writable
from dfq.pipeline.stages import (
    Measured,
    calibrate,
    choose_recipe,
    default_place,
    diagnose,
    make_calibration_set,
    make_evaluation_set,
    measure,
    prepare,
    reconstruct,
    report,
    round_weights,
    save,
)
from dfq.pipeline.workers import check_alone
from dfq.pipeline.workload import quantize_stages
from dfq.progress import Progress, announce, resolve_progress, warn
from dfq.quantization.scheme import Scheme
from dfq.recipe import METHODS, InversionSettings, Recipe, merge_arguments
from dfq.results.gates import check_shares, gate
from dfq.results.values import QuantizeResult
from dfq.runtime import onednn
from dfq.slow import slow_floats, slow_integers
from dfq.vit.load import LoadedModel, model_name
from dfq.vit.options import LoadOptions


@checked
def quantize(
    model: str | nn.Module | LoadedModel,
    *,
    bits: int | None = None,
    calibration: str | Path | None = None,
    images: int | None = None,
    iterations: int | None = None,
    stages: int | None = None,
    attention: str | None = None,
    activations: str | None = None,
    out: str | Path | None = None,
    evaluate: bool = True,
    eval: str | Path | None = None,
    class_map: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    seed: int | None = None,
    threads: int | None = None,
    precision: str | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    progress: Progress | bool | None = None,
    **options: Unpack[LoadOptions],
) -> QuantizeResult:
    """Quantize a ViT without data and write a checkpoint.

    The stages of it can be called one by one: :mod:`dfq.pipeline.stages`.

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
        activations: ``asymmetric``, unsigned with a zero point, or ``symmetric``, signed with
            zero point 0, as TensorRT requires.
        out: directory of the checkpoint; ``./MODEL-w4a8`` by default.  A dfq checkpoint
            there is replaced once the new one is complete.
        evaluate: compare with the float model; False saves the time, and leaves agreement and
            accuracy None.
        eval: images for agreement and, with labels, accuracy; see :func:`dfq.evaluate`.
            Without them, agreement is measured on inverted images.
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
    progress = resolve_progress(progress)
    check_alone("quantize", "calibration")
    bounds = {"min_agreement": min_agreement, "min_accuracy": min_accuracy}
    _check_measuring(evaluate, eval, class_map, **bounds)
    if not _inverts(calibration, evaluate, eval):
        _refuse_unused(iterations=iterations, stages=stages, precision=precision)
    method = calibration if isinstance(calibration, str) and calibration in METHODS else None
    tables = settings or {}
    settings = {
        **tables,
        "inversion": merge_arguments(
            tables.get("inversion"),
            method=method,
            images=images,
            iterations=iterations,
            stages=stages,
            seed=seed,
            threads=threads,
            precision=precision,
        ),
        "quantization": merge_arguments(
            tables.get("quantization"), bits=bits, attention=attention, activations=activations
        ),
    }
    chosen = choose_recipe(recipe, settings)
    made = method is not None or calibration is None
    slow = _slow(chosen, resolve_device(device), made, evaluate, eval)
    warn(progress, slow)
    place = _place(out, model_name(model), Scheme(chosen.quantization), progress)
    plan = prepare(
        model,
        recipe=recipe,
        settings=settings,
        device=device,
        cache=cache,
        progress=progress,
        **options,
    )
    data = make_evaluation_set(plan, eval, class_map=class_map, **bounds) if evaluate else None
    patches, tested = plan.model.vit.arch.grid.patches, _workload(data)
    announce(progress, quantize_stages(plan.recipe, patches, inverts=made, measured_on=tested))
    source = make_calibration_set(plan, None if made else calibration, images=images)
    quantized = round_weights(plan, calibrate(plan, source))
    quantized = diagnose(plan, reconstruct(plan, quantized, source), source)
    result, integer_model = save(plan, quantized, source, place), quantized.model
    del quantized  # the float model that it was rounded from
    measured = measure(plan, integer_model, data) if evaluate else Measured()
    result = report(plan, result, measured, warnings=slow, **bounds)
    gate(result)
    return result


def _check_measuring(
    evaluate: bool,
    eval: str | Path | None,
    class_map: str | Path | None,
    min_agreement: float | None,
    min_accuracy: float | None,
) -> None:
    """Raise :class:`SettingError` if the arguments about measuring contradict each other."""
    asked = {"eval": eval, "min_agreement": min_agreement, "min_accuracy": min_accuracy}
    for name, value in asked.items():
        if value is not None and not evaluate:
            raise SettingError(
                f"{option(name)} needs a measurement, which {option('evaluate', False)} turns off. "
                "Give one of them."
            )
    check_shares(min_agreement=min_agreement, min_accuracy=min_accuracy)
    if min_accuracy is not None and eval is None:
        raise SettingError(
            f"{option('min_accuracy')} needs data to measure it on: give "
            f"{option('eval', metavar='DATA')}."
        )
    if class_map is not None and eval is None:
        raise SettingError(
            f"{option('class_map')} numbers the class folders of {option('eval')}; give both."
        )


def _inverts(calibration: str | Path | None, evaluate: bool, eval: str | Path | None) -> bool:
    """Whether images are made, to calibrate on or to measure on."""
    return calibration is None or str(calibration) in METHODS or (evaluate and eval is None)


def _refuse_unused(**arguments: Any) -> None:
    """Raise :class:`SettingError` if arguments of inversion are given where nothing is inverted."""
    unused = [option(name) for name, value in arguments.items() if value is not None]
    if unused:
        raise SettingError(
            f"{', '.join(unused)} would have no effect: {option('calibration')} names the images, "
            "and none are inverted to measure on. Leave out one or the other."
        )


def _workload(data: ImageSource | InversionSettings | None) -> InversionSettings | int | None:
    """Return the settings or the number of the images to measure on."""
    return data if data is None or isinstance(data, InversionSettings) else len(data)


def _slow(
    recipe: Recipe, device: torch.device, made: bool, evaluate: bool, eval: str | Path | None
) -> list[str]:
    """Return warnings about slow inversion, of images to calibrate on (``made``) or to measure
    on, and about slow measurement of the quantized model."""
    inverts = (made and recipe.inversion.method != "noise") or (evaluate and eval is None)
    floats = slow_floats(device, inversion=recipe.inversion.precision) if inverts else []
    largest = onednn.MAX_WEIGHT_WITHOUT_VNNI if recipe.quantization.reduce_range else 127
    return [*floats, *(slow_integers(device, largest) if evaluate else [])]


def _place(out: str | Path | None, name: str, scheme: Scheme, progress: Progress) -> Path:
    """Return the directory of the checkpoint, after checks that it can be written.

    A checkpoint that will be replaced is noted.
    """
    place = default_place(name, scheme) if out is None else Path(out)
    checkpoints.check_output(place)
    check_writable(place.parent)
    if (place / checkpoints.CONFIG).is_file():
        try:
            info = checkpoints.read_info(place)
            before = f"{info.model} {Scheme(info.recipe.quantization).name}"
        except CheckpointError:
            before = "a damaged checkpoint"
        progress.note(f"{str(place)!r} holds {before}, which will be replaced")
    return place
