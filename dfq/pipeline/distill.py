"""``dfq.distill``: a student ViT trained on a teacher's inverted images."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from dfq.argument_names import option
from dfq.arguments import checked
from dfq.catalog import ALIASES
from dfq.data.images import ImageSource, load_batches
from dfq.device import resolve_device
from dfq.distillation.inherit import initialize
from dfq.distillation.student import create, student_arguments
from dfq.distillation.training import Images, train
from dfq.errors import OutputError, SettingError, UnsupportedModelError
from dfq.files import check_writable, safe_name, write_json
from dfq.inversion.objective import check_classes
from dfq.inversion.schedule import fit_stages
from dfq.pipeline.calibration_set import augmented, calibration_set
from dfq.pipeline.comparison import EVALUATION_BATCH, Comparison, compare, dense_batches, metric_of
from dfq.pipeline.evaluate import agreement_on, open_evaluation
from dfq.pipeline.workers import check_alone
from dfq.pipeline.workload import distill_stages
from dfq.progress import Progress, announce, note_all, resolve_progress, warn
from dfq.recipe import (
    METHODS,
    DistillationSettings,
    Recipe,
    is_set,
    make_recipe,
    merge_arguments,
    sets_field,
    to_dict,
)
from dfq.results.gates import unmeasured
from dfq.results.intervals import share_interval
from dfq.results.values import DistillResult, TeacherStudent, to_json
from dfq.slow import slow_floats
from dfq.vit import ViT
from dfq.vit.convert import convert
from dfq.vit.load import LoadedModel, load_model, model_name
from dfq.vit.options import LoadOptions
from dfq.vit.saved import REPORT, check_output, is_saved, save_model

READ = 64
"""Batch size of reading images."""

IMAGES = 512
"""Default number of images."""


@checked
def distill(
    teacher: str | nn.Module | LoadedModel,
    *,
    student: str | None = None,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    data: str | Path | None = None,
    images: int | None = None,
    iterations: int | None = None,
    stages: int | None = None,
    steps: int | None = None,
    start: str | None = None,
    out: str | Path | None = None,
    eval: str | Path | None = None,
    class_map: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    seed: int | None = None,
    threads: int | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: Progress | bool | None = None,
    **options: Unpack[LoadOptions],
) -> DistillResult:
    """Train a student ViT on images inverted from a teacher.

    Both see the same patches at the same positions; the student learns the teacher's
    prediction (arXiv 2509.23235, section 4.3).  The images are inverted before the training.
    The student is initialized with blocks of the teacher if they fit, else randomly.

    Args:
        teacher, weights, num_classes, img_size, in_chans, global_pool, mean, std, input_range: see
            :func:`dfq.load_model`.
        student: timm's name of the student; the teacher's own model by default.
        depth, width, heads: blocks, embedding width and attention heads; by default the named
            model's.
        data: ``pri``, ``smi``, ``dmi``, ``noise``, or the path of a sparse-image dataset, an
            image folder or an ``.npz``; ``pri`` by default.
        images: number of images to invert, or to take of a folder; 512 by default.
        iterations, stages, threads: of the inversion; see :func:`dfq.invert`.
        steps: number of training steps.
        start: initialization of the student: ``teacher``, ``random``, or ``auto``.
        out: directory of the student; ``./TEACHER-student`` by default.
        eval: images on which teacher and student are compared and, with labels, their accuracies
            measured; see :func:`dfq.evaluate`.
        class_map: a file that numbers their class folders.
        recipe: as for :func:`dfq.quantize`, of which ``inversion`` and
            ``distillation`` are read; the arguments override it.
        seed: of the student's weights, the batches and the images.
        settings: further fields, as ``{"inversion": {...}, "distillation": {...}}``.

    The directory can be given as MODEL to every other verb.

    Raises:
        RunError: the loss did not stay finite.
        DfqError: one of its other subclasses says what is wrong.
    """
    started, progress = time.perf_counter(), resolve_progress(progress)
    check_alone("distill", "data")
    if class_map is not None and eval is None:
        raise SettingError(
            f"{option('class_map')} numbers the class folders of {option('eval')}; give both."
        )
    extra = settings or {}
    if set(extra) - {"inversion", "distillation"}:
        raise SettingError(f"settings has {sorted(extra)}; known: inversion, distillation.")
    method = data if isinstance(data, str) and data in METHODS else None
    usual = {} if sets_field(recipe, "images") else {"images": IMAGES}
    inversion = {**usual, **(extra.get("inversion") or {})}
    chosen = make_recipe(
        recipe,
        inversion=merge_arguments(
            inversion,
            method=method,
            images=images,
            iterations=iterations,
            stages=stages,
            seed=seed,
            threads=threads,
        ),
        distillation=merge_arguments(
            extra.get("distillation"), steps=steps, start=start, seed=seed
        ),
    )
    plan = chosen.distillation or DistillationSettings()
    name = model_name(teacher)
    place = Path(out) if out is not None else Path(f"{safe_name(Path(name).name)}-student")
    _check_place(place, teacher, progress)
    target = resolve_device(device)
    inverts = (method or data is None) and chosen.inversion.method != "noise"
    slow = slow_floats(
        target,
        training=plan.precision,
        inversion=chosen.inversion.precision if inverts else None,
    )
    warn(progress, slow)
    loaded = load_model(teacher, **options).frozen(target)
    note_all(progress, loaded.notes)
    arch = loaded.vit.arch
    if not arch.num_classes:
        raise UnsupportedModelError(
            f"{name!r} has no classifier; distillation needs the teacher's predictions."
        )
    check_classes(arch, chosen.inversion.classes)
    if not is_set("stages", stages, inversion, recipe):
        fitting = fit_stages(chosen.inversion, arch.grid.patches)
        chosen = dataclasses.replace(chosen, inversion=fitting)
    shape = {"depth": depth, "embed_dim": width, "num_heads": heads}
    named = None if student is None else ALIASES.get(student, student)
    arguments = student_arguments(named, arch, loaded.timm_name, loaded.directory, **shape)
    model, student_arch = create(arguments, arch, plan.seed)
    begun = initialize(model, student_arch, loaded.vit, plan.start)
    model.to(target)
    tested = None
    if eval is not None:
        tested = open_evaluation(eval, arch, loaded.preprocessing, class_map)
    made, count = data is None or method is not None, 0 if tested is None else len(tested)
    to_come = distill_stages(chosen, arch.grid.patches, inverts=made, tested=count)
    announce(progress, to_come)
    source = calibration_set(
        loaded, chosen, None if method else data, target, cache, progress, images
    )
    gathered = Images.gather(augmented(source.images, plan).batches(READ))
    before = time.perf_counter()
    with progress.task("Training", plan.steps) as advance:
        losses = train(loaded.vit, model, gathered, loaded.preprocessing, plan, advance)
    result = DistillResult(
        teacher=name,
        student=str(arguments["model_name"]),
        start=begun,
        parameters=sum(p.numel() for p in model.parameters()),
        data=source.source,
        path=str(place),
        losses=losses,
        accuracy=None,
        agreement=None,
        images=None,
        seconds=time.perf_counter() - started,
        training_seconds=time.perf_counter() - before,
        warnings=slow,
    )
    about = {"timm_name": loaded.timm_name, "fingerprint": loaded.fingerprint}
    facts = {"teacher": about, "recipe": to_dict(dataclasses.replace(chosen, distillation=plan))}
    save_model(place, model, arguments, loaded.preprocessing, {**facts, **to_json(result)})
    if tested is None:
        return result
    measured = _measure(loaded, convert(model.cpu(), name).to(target), tested, target, progress)
    agreement = agreement_on(measured, tested.name)
    doubtful = unmeasured(agreement)
    result = dataclasses.replace(
        result,
        accuracy=_pair(measured),
        agreement=measured.agreement,
        images=measured.images,
        seconds=time.perf_counter() - started,
        agreement_on=agreement,
        class_order=tested.class_order,
        warnings=[*slow, *doubtful],
    )
    write_json(place / REPORT, {**facts, **to_json(result)})
    warn(progress, doubtful)
    return result


def _check_place(place: Path, teacher: str | nn.Module | LoadedModel, progress: Progress) -> None:
    """Check that a student can be written to a directory; note if one will be replaced."""
    check_output(place)
    check_writable(place.parent)
    if not is_saved(place):
        return
    directory = teacher.directory if isinstance(teacher, LoadedModel) else None
    if isinstance(teacher, str) and is_saved(teacher):
        directory = Path(teacher)
    if directory is not None and directory.exists() and place.samefile(directory):
        raise OutputError(
            f"The student would replace its teacher {str(directory)!r}. Give another "
            f"{option('out')}."
        )
    progress.note(f"{str(place)!r} holds another student, which will be replaced")


def _pair(measured: Comparison) -> TeacherStudent | None:
    if measured.float is None or measured.quantized is None:
        return None
    share, images = measured.quantized.top1, measured.images
    interval = share_interval(round(share * images), images)
    return TeacherStudent(measured.float.top1, share, list(interval))


def _measure(
    loaded: LoadedModel,
    student: ViT,
    source: ImageSource,
    device: torch.device,
    progress: Progress,
) -> Comparison:
    images = load_batches(source, loaded.preprocessing, EVALUATION_BATCH)
    with progress.task("Evaluating", len(source)) as advance:
        batches, metric = dense_batches(images, device), metric_of(loaded.vit.arch)
        return compare(student, loaded.vit, batches, advance, metric=metric)
