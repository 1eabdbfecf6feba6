"""The verbs: load -> invert -> quantize -> evaluate, each with the disk between them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from dfq import checkpoint as checkpoints
from dfq.arguments import checked
from dfq.cache import cache_directory
from dfq.comparison import Comparison, compare, dense_batches, metric_of, sparse_batches
from dfq.dataset import (
    SETTINGS,
    SparseImageDataset,
)
from dfq.device import resolve_device
from dfq.errors import (
    CheckpointError,
    DataError,
    DatasetError,
    GateError,
    SettingError,
    nearest,
)
from dfq.files import check_writable, make_directory
from dfq.images import DenseImages, ImageSource, load_batches, open_images
from dfq.inversion import plan_units
from dfq.inversion.workers import check_alone
from dfq.progress import Progress, Silent
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.coverage import Additions, Coverage
from dfq.quantization.diagnosis import layer_noise
from dfq.quantization.equalization import equalize
from dfq.quantization.reconstruction import reconstruct
from dfq.quantization.scheme import layers, scheme_name
from dfq.recipe import (
    SECTIONS,
    InversionSettings,
    Method,
    Recipe,
    load_recipe,
    override,
)
from dfq.results import (
    AgreementOn,
    BlockLoss,
    Bytes,
    CalibrationSource,
    EvaluateResult,
    FloatQuantized,
    InvertResult,
    QuantizeResult,
    Seconds,
    to_json,
)
from dfq.synthesis import make_dataset, versions
from dfq.vit import Architecture, Preprocessing, ViT
from dfq.vit.load import LoadedModel, load_model, module_name

HELD_OUT_SEED = 1_000_003
"""Added to the seed of the images on which agreement is measured without data."""

EVALUATION_BATCH = 50

DIAGNOSIS_BATCH, DIAGNOSIS_BATCHES = 4, 4
"""Images of the calibration set on which every layer is measured: at most 4 times 4."""

METHODS: tuple[str, ...] = get_args(Method)


def make_recipe(
    recipe: str | Path | Recipe | None,
    *,
    inversion: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
) -> Recipe:
    """A recipe (a file, a value or the defaults) with single settings overridden.

    Raises:
        RecipeError, SettingError: as their names say.
    """
    if recipe is None:
        recipe = Recipe()
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    recipe = override(recipe, "inversion", **(inversion or {}))
    recipe = override(recipe, "quantization", **(quantization or {}))
    return override(recipe, "distillation", **distillation) if distillation else recipe


def given(settings: dict[str, Any] | None, **arguments: Any) -> dict[str, Any]:
    """Settings with the arguments that the caller gave put over them."""
    return {**(settings or {}), **{k: v for k, v in arguments.items() if v is not None}}


@checked
def invert(
    model: str | nn.Module,
    *,
    method: str | None = None,
    images: int | None = None,
    iterations: int | None = None,
    stages: int | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
    threads: int | None = None,
    precision: str | None = None,
    recipe: str | Path | Recipe | None = None,
    settings: dict[str, Any] | None = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> InvertResult:
    """Invert a model into a sparse-image dataset, in the cache or in ``out``.

    Args:
        model, weights, num_classes, img_size, mean, std: see :func:`dfq.load_model`.
        method: ``pri``, ``smi``, ``dmi`` or ``noise``.
        images: how many to make.
        iterations: of a trajectory.
        stages: ``pri``: images a trajectory yields.
        out: a directory for the dataset; without it the cache keeps it.
        seed: of noise, targets and jitter.
        threads: of the optimisation; torch's by default.
        precision: ``auto``, ``float32``, ``bfloat16`` or ``int8``.
        recipe: a TOML file or a :class:`dfq.Recipe`; the arguments override it.
        settings: further fields of :class:`dfq.InversionSettings` to override.

    Raises:
        DfqError: one of its subclasses says what is wrong.
    """
    overrides = given(
        settings,
        method=method,
        images=images,
        iterations=iterations,
        stages=stages,
        seed=seed,
        threads=threads,
        precision=precision,
    )
    chosen = make_recipe(recipe, inversion=overrides).inversion
    target = resolve_device(device)
    loaded = load_model(
        model, weights=weights, num_classes=num_classes, img_size=img_size, mean=mean, std=std
    )
    started = time.perf_counter()
    dataset, cached = make_dataset(
        loaded,
        chosen,
        out=None if out is None else Path(out),
        device=target,
        cache=cache,
        progress=progress or Silent(),
    )
    return InvertResult(
        model=loaded.name,
        method=chosen.method,
        images=len(dataset),
        path=str(dataset.path),
        cached=cached,
        seconds=time.perf_counter() - started,
        bytes=dataset.bytes,
    )


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
    recipe: str | Path | Recipe | None = None,
    seed: int | None = None,
    threads: int | None = None,
    precision: str | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a ViT without data and write a checkpoint.

    Args:
        model, weights, num_classes, img_size, mean, std: see :func:`dfq.load_model`.
        bits: 4 or 8, of the weights; activations have 8.
        calibration: ``pri``, ``smi``, ``dmi``, ``noise``, or the path of a sparse-image
            dataset, an image folder or an ``.npz``.
        images: size of the calibration set.
        iterations, stages, seed, threads, precision: of the inversion; see
            :func:`dfq.invert`.
        attention: ``float`` or ``int8``.
        out: directory of the checkpoint; ``./MODEL-w4a8`` by default.  A dfq checkpoint
            there is replaced once the new one is complete.
        eval: labelled data for accuracy; see :func:`dfq.evaluate`.
        recipe: a TOML file or a :class:`dfq.Recipe`; the arguments override it.
        settings: further fields to override, as ``{"inversion": {...}, "quantization":
            {...}}``.
        min_agreement, min_accuracy: bounds from 0 to 1; below one the result is refused,
            though the checkpoint is written.

    Raises:
        GateError: agreement or accuracy is below its bound.
        DfqError: one of its other subclasses says what is wrong.
    """
    clock, progress = _Clock(), progress or Silent()
    check_alone("quantize", "--calibration")
    _check_shares(min_agreement=min_agreement, min_accuracy=min_accuracy)
    if min_accuracy is not None and eval is None:
        raise SettingError("min_accuracy needs data to measure it on: give eval (--eval DATA).")
    method = calibration if isinstance(calibration, str) and calibration in METHODS else None
    extra = settings or {}
    for section in extra:
        if section not in SECTIONS:
            raise SettingError(
                f"settings has an unknown table {section!r}; known: {', '.join(SECTIONS)}."
                f"{nearest(section, SECTIONS)}"
            )
    chosen = make_recipe(
        recipe,
        inversion=given(
            extra.get("inversion"),
            method=method,
            images=images,
            iterations=iterations,
            stages=stages,
            seed=seed,
            threads=threads,
            precision=precision,
        ),
        quantization=given(extra.get("quantization"), bits=bits, attention=attention),
    )
    chosen = dataclasses.replace(chosen, distillation=None)
    target = resolve_device(device)
    name = model if isinstance(model, str) else module_name(model)
    scheme = scheme_name(chosen.quantization)
    out = Path(out) if out is not None else Path(f"{_file_name(name)}-{scheme}")
    checkpoints.check_output(out)
    check_writable(out.parent)
    _note_replaced(out, name, scheme, progress)
    with clock("load"):
        loaded = load_model(
            model, weights=weights, num_classes=num_classes, img_size=img_size, mean=mean, std=std
        )
        vit = loaded.vit.to(target)
        data = None
        if eval is not None:
            data = _open_evaluation(eval, vit.arch, loaded.preprocessing, min_accuracy)
        else:
            plan_units(
                _held_out_settings(chosen.inversion, vit.arch.grid.patches), vit.arch.grid.patches
            )
    if eval is None:
        make_directory(cache_directory(cache) / "datasets")
    with clock("invert"):
        source, origin = calibration_set(
            loaded, chosen, None if method else calibration, target, cache, progress, images
        )
    wide = covered(source, chosen.quantization)
    with clock("calibrate"), progress.task("Calibrating", len(wide)) as advance:
        found = calibrate(
            vit,
            wide.batches(chosen.quantization.batch),
            loaded.preprocessing,
            chosen.quantization,
            advance,
        )
    with clock("quantize"), progress.task("Quantizing", len(layers(vit.arch))) as advance:
        equal, found = equalize(vit, found, chosen.quantization.equalize)
        quantized = quantize_vit(equal, found, loaded.preprocessing, chosen.quantization, advance)
        del found
    steps = chosen.quantization.reconstruct
    losses: list[BlockLoss] = []
    if steps:
        with clock("quantize"), progress.task("Reconstructing", vit.arch.depth) as advance:
            seen = wide.batches(chosen.quantization.batch)
            losses = reconstruct(equal, quantized, seen, steps, chosen.inversion.seed, advance)
    with clock("quantize"):
        diagnosed = islice(source.batches(DIAGNOSIS_BATCH), DIAGNOSIS_BATCHES)
        noise = layer_noise(equal, quantized, diagnosed)
        del equal
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
    result = _save(result, out, quantized, loaded, chosen)
    with clock("evaluate"):
        if data is not None:
            batches = dense_batches(
                load_batches(data, loaded.preprocessing, EVALUATION_BATCH), target
            )
            with progress.task("Evaluating", len(data)) as advance:
                comparison = compare(quantized, vit, batches, advance, metric=metric_of(vit.arch))
            measured_on = data.name
        else:
            comparison = _held_out(loaded, quantized, chosen.inversion, target, cache, progress)
            measured_on = "inverted"
    result = dataclasses.replace(
        result,
        agreement=comparison.agreement,
        accuracy=_pair(comparison, "top1"),
        accuracy_top5=_pair(comparison, "top5"),
        agreement_on=AgreementOn(measured_on, comparison.images, comparison.metric, comparison.kl),
        seconds=clock.seconds(),
    )
    checkpoints.write_report(out, to_json(result))
    _gate(result, min_agreement, min_accuracy)
    return result


def _note_replaced(out: Path, name: str, scheme: str, progress: Progress) -> None:
    """Say that another model's checkpoint, or one of another scheme, will be replaced."""
    if not (out / checkpoints.CONFIG).is_file():
        return
    try:
        info = checkpoints.read_info(out)
    except CheckpointError:
        before = ("a damaged checkpoint", "")
    else:
        before = (info.model, scheme_name(info.recipe.quantization))
    if before != (name, scheme):
        progress.note(f"{str(out)!r} holds {' '.join(before).strip()}, which will be replaced")


def _open_evaluation(
    data: str | Path,
    arch: Architecture,
    preprocessing: Preprocessing,
    min_accuracy: float | None,
) -> ImageSource:
    if min_accuracy is not None and not arch.num_classes:
        raise SettingError("min_accuracy needs a classifier; the model has none.")
    return open_images(data, arch, preprocessing, labelled=bool(arch.num_classes))


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


def calibration_set(
    loaded: LoadedModel,
    recipe: Recipe,
    path: str | Path | None,
    device: torch.device,
    cache: str | Path | None,
    progress: Progress,
    images: int | None = None,
) -> tuple[SparseImageDataset | DenseImages, CalibrationSource]:
    """The images that a verb works on, made or opened, and what they are.

    Raises:
        SettingError: the caller asked for so many ``images`` and named a dataset of others.
    """
    settings = recipe.inversion
    if path is None:
        dataset, cached = make_dataset(
            loaded, settings, out=None, device=device, cache=cache, progress=progress
        )
        origin = CalibrationSource(settings.method, len(dataset), str(dataset.path), cached)
        return dataset, origin
    if (Path(path) / SETTINGS).is_file():
        dataset = SparseImageDataset(path)
        _check_model(dataset, loaded)
        if images not in (None, len(dataset)):
            raise SettingError(
                f"images is {images}, but the dataset {str(path)!r} of {len(dataset)} is taken "
                "whole. Leave images (--images) out, or make a dataset of that many."
            )
        return dataset, CalibrationSource(dataset.method, len(dataset), str(path), None)
    if not Path(path).exists() and str(path) != "demo":
        raise DataError(
            f"{str(path)!r} is neither a method ({', '.join(METHODS)}) nor an existing "
            f"sparse-image dataset, image folder or .npz.{nearest(str(path), METHODS)}"
        )
    source = open_images(path, loaded.vit.arch, loaded.preprocessing, labelled=False)
    dense = DenseImages(source, loaded.vit.arch, settings.images)
    return dense, CalibrationSource("images", len(dense), str(path), None)


def covered(
    source: SparseImageDataset | DenseImages, settings: Additions
) -> SparseImageDataset | DenseImages | Coverage:
    """Inverted images with what makes them cover real ones; other images as they are."""
    if isinstance(source, SparseImageDataset) and source.method != "noise":
        return Coverage(source, settings)
    return source


def _check_model(dataset: SparseImageDataset, loaded: LoadedModel) -> None:
    if dataset.fingerprint != loaded.fingerprint:
        made_from = dataset.settings.get("model", {}).get("name", "unknown")
        raise DatasetError(
            f"The dataset {str(dataset.path)!r} was made from another model ({made_from!r}, "
            f"fingerprint {dataset.fingerprint[:12]}) than {loaded.name!r} (fingerprint "
            f"{loaded.fingerprint[:12]}). Invert this model, or use the weights it was made from."
        )
    if dataset.grid != loaded.vit.arch.grid:
        raise DatasetError(
            f"The dataset {str(dataset.path)!r} has a grid of {dataset.grid}, the model one of "
            f"{loaded.vit.arch.grid}. Make the dataset again."
        )


def _held_out_settings(settings: InversionSettings, patches: int) -> InversionSettings:
    """As the calibration set's, but of another seed and never noise."""
    method = settings.method if settings.method != "noise" else InversionSettings().method
    most = min(settings.iterations, patches)
    stages = min(settings.stages, most) if method == "pri" else 1
    return dataclasses.replace(
        settings,
        method=method,
        stages=stages,
        leave_at=settings.leave_at if stages == settings.stages else (),
        seed=(settings.seed + HELD_OUT_SEED) % 2**31,
        images=settings.unit_size * stages,
    )


def _held_out(
    loaded: LoadedModel,
    quantized: QuantizedViT,
    settings: InversionSettings,
    device: torch.device,
    cache: str | Path | None,
    progress: Progress,
) -> Comparison:
    """Compare on images inverted with another seed, which calibration did not see."""
    fresh = _held_out_settings(settings, loaded.vit.arch.grid.patches)
    dataset, _ = make_dataset(
        loaded,
        fresh,
        out=None,
        device=device,
        cache=cache,
        progress=progress,
        purpose="held-out ",
    )
    batches = sparse_batches(dataset.batches(EVALUATION_BATCH), loaded.vit, loaded.preprocessing)
    return compare(quantized, loaded.vit, batches, metric=metric_of(loaded.vit.arch))


def _pair(comparison: Comparison | None, name: Literal["top1", "top5"]) -> FloatQuantized | None:
    if comparison is None or comparison.quantized is None:
        return None
    reference = None if comparison.float is None else getattr(comparison.float, name)
    return FloatQuantized(reference, getattr(comparison.quantized, name))


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
    _check_shares(min_agreement=min_agreement, min_accuracy=min_accuracy)
    if min_agreement is not None and float_model is None:
        raise SettingError("min_agreement needs the float model: give float_model (--float MODEL).")
    for name, value in (("weights", weights), ("img_size", img_size)):
        if value is not None and float_model is None:
            raise SettingError(f"{name} is of the float model: name it too (--float MODEL).")
    progress = progress or Silent()
    target = resolve_device(device)
    info = checkpoints.read_info(path)
    model = checkpoints.load(path, device=target).set_backend(backend)
    source = _open_evaluation(data, model.arch, model.preprocessing, min_accuracy)
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
        accuracy=_pair(comparison, "top1"),
        accuracy_top5=_pair(comparison, "top5"),
        backend=model.backend,
        seconds=comparison.seconds,
        images_per_second=comparison.images / comparison.seconds,
    )
    _gate(result, min_agreement, min_accuracy)
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


def _check_shares(**bounds: float | None) -> None:
    for name, value in bounds.items():
        if value is not None and not 0 <= value <= 1:
            raise SettingError(f"{name} is {value}; it is a share from 0 to 1.")


def _gate(
    result: QuantizeResult | EvaluateResult,
    min_agreement: float | None,
    min_accuracy: float | None,
) -> None:
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


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
