"""``dfq.evaluate``: accuracy and agreement of a checkpoint on the user's images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import nn

from dfq import checkpoint as checkpoints
from dfq.argument_names import option
from dfq.arguments import checked
from dfq.data.images import ImageSource, load_batches, open_images
from dfq.device import resolve_device
from dfq.engines.load import open_checkpoint
from dfq.engines.module import EngineModel
from dfq.engines.sessions import TORCH
from dfq.errors import SettingError, WeightsError
from dfq.pipeline.comparison import (
    EVALUATION_BATCH,
    Comparison,
    compare,
    dense_batches,
    metric_of,
)
from dfq.progress import Progress, note_all, resolve_progress, warn
from dfq.quantization import QuantizedViT
from dfq.quantization.scheme import Scheme
from dfq.results.gates import check_bounds, check_bounds_decidable, check_shares, doubts, gate
from dfq.results.intervals import share_interval
from dfq.results.values import AgreementOn, EvaluateResult, FloatQuantized, Metric
from dfq.slow import slow_integers
from dfq.vit import Architecture, Preprocessing
from dfq.vit.load import LoadedModel, load_model
from dfq.vit.options import LoadOptions, WeightsOptions, pool_of
from dfq.vit.saved import is_saved


def _float_model_advice() -> str:
    return (
        "Name the model that the checkpoint was made from "
        f"({option('float_model', metavar='MODEL')}, {option('weights', metavar='FILE')})."
    )


NORMALIZATION = ("mean", "std", "input_range")
"""Fields of the preprocessing that define the network's input."""


@checked
def evaluate(
    path: str | Path,
    *,
    data: str | Path,
    float_model: str | nn.Module | LoadedModel | None = None,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    runtime: str = TORCH,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    class_map: str | Path | None = None,
    progress: Progress | bool | None = None,
    **options: Unpack[WeightsOptions],
) -> EvaluateResult:
    """Measure a checkpoint on images, compared with the float model if one is named.

    Accuracy needs labels, agreement the float model.

    Args:
        path: the checkpoint.
        data: an image folder with one folder a class or with image files alone, an ``.npz``
            with ``x`` (and ``y``), or ``"demo"``.
        float_model, weights, img_size, in_chans, global_pool: the float model, as for
            :func:`dfq.load_model`; the checkpoint's values by default.
        backend: integer kernels of PyTorch, ``onednn``, ``int_mm``, ``float`` or
            ``reference``.
        runtime: what executes the checkpoint, as for :func:`dfq.load`.
        min_agreement, min_accuracy: bounds from 0 to 1, of the lower ends of 95 % intervals.
        class_map: a file that numbers the class folders; see
            :func:`dfq.data.image_files.read_class_map`.

    Raises:
        GateError: the interval of agreement or accuracy begins below its bound.
        DfqError: one of its other subclasses says what is wrong.
    """
    check_shares(min_agreement=min_agreement, min_accuracy=min_accuracy)
    if min_agreement is not None and float_model is None:
        raise SettingError(
            f"{option('min_agreement')} needs the float model: give "
            f"{option('float_model', metavar='MODEL')}."
        )
    for name, value in options.items():
        if value is not None and float_model is None:
            raise SettingError(
                f"{option(name)} describes the float model; name it too, by "
                f"{option('float_model', metavar='MODEL')}."
            )
    progress = resolve_progress(progress)
    target = resolve_device(device)
    info = checkpoints.read_info(path)
    model = open_checkpoint(path, device=target, runtime=runtime).set_backend(backend)
    chosen = backend or isinstance(model, EngineModel)
    slow = [] if chosen else slow_integers(target, model.max_weight())
    warn(progress, slow)
    metric = metric_of(model.arch)
    source = open_evaluation(data, model.arch, model.preprocessing, class_map)
    check_measurable(source, metric, min_agreement, min_accuracy, "data")
    if float_model is None and (source.class_order is None or metric == "cosine"):
        missing = "a classifier" if metric == "cosine" else f"labels in {source.name!r}"
        raise SettingError(
            f"Without {missing} there is agreement alone to measure, and it needs the float model: "
            f"give {option('float_model', metavar='MODEL')}."
        )
    made_from = str(info.source.get("fingerprint"))
    reference = None
    if float_model is not None:
        loaded = _load_float(model, float_model, options).frozen(target)
        note_all(progress, loaded.notes)
        _check_same(loaded, model)
        if loaded.fingerprint != made_from:
            progress.note(
                "The float model's weights are not those that the checkpoint was made from."
            )
        reference = loaded.vit
    batches = dense_batches(load_batches(source, model.preprocessing, EVALUATION_BATCH), target)
    with progress.task("Evaluating", len(source)) as advance:
        comparison = compare(model, reference, batches, advance, metric=metric)
    agreement = None if reference is None else agreement_on(comparison, source.name)
    accuracy, doubtful = accuracy_pair(comparison, "top1"), doubts(agreement)
    result = EvaluateResult(
        checkpoint=str(path),
        model=info.model,
        scheme=Scheme(info.recipe.quantization).name,
        data=source.name,
        images=comparison.images,
        agreement=comparison.agreement,
        metric=comparison.metric,
        kl=comparison.kl,
        accuracy=accuracy,
        accuracy_top5=accuracy_pair(comparison, "top5"),
        backend=model.backend,
        seconds=comparison.seconds,
        images_per_second=comparison.images / comparison.seconds,
        agreement_on=agreement,
        class_order=None if accuracy is None else source.class_order,
        gate=check_bounds(agreement, accuracy, min_agreement, min_accuracy),
        warnings=[*slow, *doubtful],
    )
    warn(progress, doubtful)
    gate(result)
    return result


def _load_float(
    model: QuantizedViT | EngineModel,
    float_model: str | nn.Module | LoadedModel,
    options: WeightsOptions,
) -> LoadedModel:
    """Load the float model; a model given by name gets the checkpoint's shape and preprocessing."""
    if isinstance(float_model, LoadedModel):
        return load_model(float_model, **options)
    arch, own = model.arch, model.preprocessing
    built = isinstance(float_model, str) and not is_saved(float_model)  # so its shape is open
    shape: LoadOptions = {
        "num_classes": 0 if built and not arch.num_classes else None,
        "mean": own.mean,
        "std": own.std,
        "input_range": own.input_range,
        **options,
    }
    if built and float_model != "demo":
        if shape.get("img_size") is None:
            shape["img_size"] = arch.image_size
        if shape.get("global_pool") is None:
            shape["global_pool"] = pool_of(arch)
    try:
        return load_model(float_model, **shape)
    except (SettingError, WeightsError) as error:
        if not error.advice:
            raise
        facts = error.facts
        if isinstance(error, SettingError):
            facts = (
                "The float model takes another number of channels than the checkpoint, which "
                f"takes {arch.in_channels}."
            )
        raise SettingError(f"{facts} {_float_model_advice()}") from error


def _check_same(loaded: LoadedModel, model: QuantizedViT | EngineModel) -> None:
    """Raise :class:`SettingError` unless the float model takes the checkpoint's images."""
    preprocessing = {name: getattr(model.preprocessing, name) for name in NORMALIZATION}
    pairs = (
        ("architecture", dataclasses.asdict(model.arch), loaded.vit.arch),
        ("normalization", preprocessing, loaded.preprocessing),
    )
    for what, own, other in pairs:
        differing = [
            f"{field.replace('_', ' ')} {theirs!r} instead of {ours!r}"
            for field, ours in own.items()
            if (theirs := getattr(other, field)) != ours
        ]
        if differing:
            raise SettingError(
                f"The float model {loaded.name!r} has another {what} than the checkpoint: "
                f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}. "
                f"{_float_model_advice()}"
            )


def open_evaluation(
    data: str | Path,
    arch: Architecture,
    preprocessing: Preprocessing,
    class_map: str | Path | None = None,
) -> ImageSource:
    """Open the images to measure on, with labels if there are any and the model has a classifier.

    Raises:
        SettingError: ``class_map`` is given for a model without a classifier.
        DataError: the images cannot be used.
    """
    if class_map is not None and not arch.num_classes:
        raise SettingError(f"{option('class_map')} needs a classifier; the model has none.")
    labeled = None if arch.num_classes else False
    return open_images(data, arch, preprocessing, labeled=labeled, class_map=class_map)


def check_measurable(
    source: ImageSource,
    metric: Metric,
    min_agreement: float | None,
    min_accuracy: float | None,
    data: str,
) -> None:
    """Raise :class:`SettingError` if the images cannot decide a bound.

    ``data``: name of the parameter with the images.
    """
    if min_accuracy is not None and metric == "cosine":
        raise SettingError(f"{option('min_accuracy')} needs a classifier; the model has none.")
    if min_accuracy is not None and source.class_order is None:
        raise SettingError(
            f"{option('min_accuracy')} needs labels; {source.name!r} has none: no class "
            f"folders, or no y. Bound the agreement ({option('min_agreement')}), or give "
            "labeled images."
        )
    check_bounds_decidable(metric, min_agreement, min_accuracy, len(source), data)


def agreement_on(comparison: Comparison, data: str) -> AgreementOn:
    """Convert a comparison to the agreement on images called ``data``."""
    return AgreementOn(
        data=data,
        images=comparison.images,
        metric=comparison.metric,
        kl=comparison.kl,
        agreement=comparison.agreement,
        agreeing=comparison.agreeing,
        interval=None if comparison.interval is None else list(comparison.interval),
        threshold=comparison.threshold,
        error_over_spread=comparison.error_over_spread,
        not_finite=comparison.not_finite,
    )


def accuracy_pair(comparison: Comparison, name: Literal["top1", "top5"]) -> FloatQuantized | None:
    """Return an accuracy of both models; None if the images have no labels."""
    if comparison.quantized is None:
        return None
    reference = None if comparison.float is None else getattr(comparison.float, name)
    share, images = getattr(comparison.quantized, name), comparison.images
    correct = round(share * images)
    return FloatQuantized(reference, share, correct, images, list(share_interval(correct, images)))
