"""``dfq.evaluate``: a checkpoint on labelled data, and the bounds that results must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dfq import checkpoint as checkpoints
from dfq.arguments import checked
from dfq.comparison import EVALUATION_BATCH, Comparison, compare, dense_batches, metric_of
from dfq.device import resolve_device
from dfq.errors import GateError, SettingError
from dfq.images import ImageSource, load_batches, open_images
from dfq.progress import Progress, Silent
from dfq.quantization import QuantizedViT
from dfq.quantization.scheme import scheme_name
from dfq.results import EvaluateResult, FloatQuantized, QuantizeResult
from dfq.vit import Architecture, Preprocessing, ViT
from dfq.vit.load import load_model


@checked
def evaluate(
    path: str | Path,
    *,
    data: str | Path,
    float_model: str | nn.Module | None = None,
    weights: str | Path | None = None,
    img_size: int | None = None,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Measure a checkpoint on labelled data, beside the float model where one is named.

    Args:
        path: the checkpoint.
        data: an image folder with one folder a class, an ``.npz`` with ``x`` and ``y``, or
            ``"demo"``.
        float_model, weights, img_size: the float model, as for :func:`dfq.load_model`.
        backend: integer kernels, ``onednn`` or ``reference``.
        min_agreement, min_accuracy: bounds from 0 to 1.

    Raises:
        GateError: agreement or accuracy is below its bound.
        DfqError: one of its other subclasses says what is wrong.
    """
    check_shares(min_agreement=min_agreement, min_accuracy=min_accuracy)
    if min_agreement is not None and float_model is None:
        raise SettingError("min_agreement needs the float model: give float_model (--float MODEL).")
    for name, value in (("weights", weights), ("img_size", img_size)):
        if value is not None and float_model is None:
            raise SettingError(f"{name} is of the float model: name it too (--float MODEL).")
    progress = progress or Silent()
    target = resolve_device(device)
    info = checkpoints.read_info(path)
    model = checkpoints.load(path, device=target).set_backend(backend)
    source = open_evaluation(data, model.arch, model.preprocessing, min_accuracy)
    made_from = str(info.source.get("fingerprint"))
    reference = _float_reference(model, made_from, float_model, weights, img_size, target, progress)
    batches = dense_batches(load_batches(source, model.preprocessing, EVALUATION_BATCH), target)
    with progress.task("Evaluating", len(source)) as advance:
        comparison = compare(model, reference, batches, advance, metric=metric_of(model.arch))
    result = EvaluateResult(
        checkpoint=str(path),
        model=info.model,
        scheme=scheme_name(info.recipe.quantization),
        data=source.name,
        images=comparison.images,
        agreement=comparison.agreement,
        metric=comparison.metric,
        kl=comparison.kl,
        accuracy=accuracy_pair(comparison, "top1"),
        accuracy_top5=accuracy_pair(comparison, "top5"),
        backend=model.backend,
        seconds=comparison.seconds,
        images_per_second=comparison.images / comparison.seconds,
    )
    gate(result, min_agreement, min_accuracy)
    return result


def _float_reference(
    model: QuantizedViT,
    fingerprint: str,
    name: str | nn.Module | None,
    weights: str | Path | None,
    img_size: int | None,
    device: torch.device,
    progress: Progress,
) -> ViT | None:
    if name is None:
        return None
    height, width = model.arch.image_size
    size = img_size or (height if height == width and name != "demo" else None)
    classes = model.arch.num_classes
    loaded = load_model(
        name,
        weights=weights,
        num_classes=classes,
        img_size=size,
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
    )
    if loaded.fingerprint != fingerprint:
        progress.note("The float model's weights are not those that the checkpoint was made from.")
    if loaded.vit.arch != model.arch:
        raise SettingError(
            f"The float model {loaded.name!r} has another architecture than the checkpoint."
        )
    return loaded.vit.to(device)


def open_evaluation(
    data: str | Path,
    arch: Architecture,
    preprocessing: Preprocessing,
    min_accuracy: float | None,
) -> ImageSource:
    """The images to measure on; labelled where the model has a classifier.

    Raises:
        SettingError: ``min_accuracy`` is asked of a model without one.
        DataError: the images cannot be used.
    """
    if min_accuracy is not None and not arch.num_classes:
        raise SettingError("min_accuracy needs a classifier; the model has none.")
    return open_images(data, arch, preprocessing, labelled=bool(arch.num_classes))


def accuracy_pair(comparison: Comparison, name: Literal["top1", "top5"]) -> FloatQuantized | None:
    """An accuracy of both models; None where the images have no labels."""
    if comparison.quantized is None:
        return None
    reference = None if comparison.float is None else getattr(comparison.float, name)
    return FloatQuantized(reference, getattr(comparison.quantized, name))


def check_shares(**bounds: float | None) -> None:
    """Raise :class:`SettingError` for a bound that is not from 0 to 1."""
    for name, value in bounds.items():
        if value is not None and not 0 <= value <= 1:
            raise SettingError(f"{name} is {value}; it is a share from 0 to 1.")


def gate(
    result: QuantizeResult | EvaluateResult,
    min_agreement: float | None,
    min_accuracy: float | None,
) -> None:
    """Raise :class:`GateError`, which carries the result, if it is below a bound."""
    accuracy = None if result.accuracy is None else result.accuracy.quantized
    missed = []
    for what, value, bound in (
        ("Agreement with the float model", result.agreement, min_agreement),
        ("Top-1 accuracy", accuracy, min_accuracy),
    ):
        if bound is not None and (value is None or not value >= bound):
            shown = "not measured" if value is None else f"{value:.4f}"
            missed.append(f"{what} is {shown}, below the bound of {bound}.")
    if missed:
        raise GateError(" ".join(missed), result)
