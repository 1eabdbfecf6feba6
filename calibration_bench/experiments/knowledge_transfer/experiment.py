"""Distillation by source of the images.

``count``: equal numbers of images of every method.  ``time``: equal seconds of inversion.
``class``: images of one class only, and the accuracy on the others (arXiv 2509.23235,
section 4.3).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import dfq
from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.experiments.knowledge_transfer.tables import transfer_tables
from calibration_bench.measure.logits import compare, float_logits, logits
from calibration_bench.measure.methods import Method
from calibration_bench.measure.quantized import (
    FLOATS,
    Made,
    ModelOptions,
    about,
    check_inversion,
    inversion,
    load,
    model_arguments,
    scratch,
)
from calibration_bench.measure.sources import RealImages, Source, make
from dfq import DistillationSettings, DistillResult
from dfq.errors import SettingError

COMPARISONS = ("count", "time", "class")
MAX_BUDGET = 1e6
"""Largest ``--budget`` in seconds."""

NO_AUGMENTATION: dict[str, Any] = {"smooth": (), "fractal": 0}


@dataclass(frozen=True)
class Options(ModelOptions):
    """Options of ``run knowledge-transfer``."""

    comparisons: str = option(",".join(COMPARISONS), "Comparisons: count, time, class.")
    sources: str = option(
        "dmi,smi,pri4,noise",
        "Sources of the training images: real, noise, uniform, fractal, dmi, smi, pri4, ...; "
        "each also as NAME+coverage, with dfq's augmentation.",
    )
    class_sources: str = option(
        "dmi,pri4", "Sources of the comparison class; with --real also real."
    )
    real: str | None = option(
        None, "Labeled training images for the source real: a folder or .npz."
    )
    images: int = option(32, "Number of images in the comparisons count and class.")
    budget: float = option(2.0, "Seconds of inversion in the comparison time.")
    one_class: int = option(0, "Index of the class in the comparison class.")
    iterations: int = option(24, "Iterations of a trajectory.")
    student: str | None = option(
        None, "timm's name of the student; by default the teacher's model."
    )
    depth: int | None = option(2, "Blocks of the student.")
    width: int | None = option(None, "Embedding width of the student.")
    heads: int | None = option(None, "Attention heads of the student.")
    start: str = option("auto", "Initialization of the student: teacher, random or auto.")
    steps: int = option(50, "Training steps.")
    batch: int = option(32, "Batch size of training.")
    limit: int | None = option(256, "Number of test images, the first of --data.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return the keys by seed and comparison over the sources, so that these take turns."""
    for value, flag in ((options.images, "--images"), (options.iterations, "--iterations")):
        at_least(value, 1, flag)
    at_least(options.limit, 1, "--limit")
    for name in ("depth", "width", "heads"):
        if getattr(options, name) is not None:
            at_least(getattr(options, name), 1, f"--{name}")
    if not 0 < options.budget <= MAX_BUDGET:
        raise SettingError(
            f"--budget is {options.budget}; it must be above 0 and at most {MAX_BUDGET:g} seconds."
        )
    comparisons = words(options.comparisons, "--comparisons", COMPARISONS)
    bench.notes.note(f"loading {options.model} and {options.data}")
    shared = {**about(options, *load(options)), **_student(options)}
    return [
        {**shared, **part, "seed": seed}
        for seed in numbers(options.seeds, "--seeds")
        for comparison in comparisons
        for part in _parts(options, comparison, shared, seed)
    ]


def _student(options: Options) -> Key:
    """Return the part of the keys about the student's architecture and training."""
    start = cast(Any, options.start)
    plan = DistillationSettings(steps=options.steps, batch=options.batch, start=start)
    names = ("student", "depth", "width", "heads", "start")
    return {**{n: getattr(options, n) for n in names}, "steps": plan.steps, "batch": plan.batch}


def _parts(options: Options, comparison: str, shared: Key, seed: int) -> Iterator[Key]:
    """Yield the part of the keys about a comparison, source by source."""
    one = comparison == "class"
    flag = "--class-sources" if one else "--sources"
    given = words(options.class_sources if one else options.sources, flag)
    if options.real is not None and "real" not in given:
        given.append("real")
    classes = _classes(options.one_class if one else None)
    _check_class(options, classes)
    for source in map(Source, given):
        if source.base in ("real", "noise", "uniform", "fractal") and comparison == "time":
            continue
        if source.base == "real" and options.real is None:
            raise SettingError(f"{flag} has the source real; give its images with --real.")
        if source.base in ("noise", "uniform", "fractal") and one:
            raise SettingError(
                f"{flag} has {source.name!r}, whose images have no labels. Leave it out."
            )
        real = None
        if source.base == "real":
            tested = load(options)[1]
            real = _real(options, classes).identity(options.images, seed, tested)
        check_inversion(source.base, shared, options.images, options.iterations, load(options)[0])
        yield {
            "comparison": comparison,
            "source": source.name,
            "real": real,
            "images": None if comparison == "time" else options.images,
            "budget": options.budget if comparison == "time" else None,
            "one_class": options.one_class if one else None,
            "iterations": options.iterations if source.inverted else 0,
        }


def _classes(one: int | None) -> list[int]:
    return [] if one is None else [one]


def _check_class(options: Options, classes: list[int]) -> None:
    known = load(options)[0].vit.arch.num_classes
    if any(not 0 <= c < known for c in classes):
        raise SettingError(f"--one-class is {classes[0]}; the model has classes 0 to {known - 1}.")


def _real(options: Options, classes: list[int]) -> RealImages:
    return RealImages(load(options)[0], options.real, options.data, None, classes)


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Make images, train a student on them, and evaluate it on the test images."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    loaded, data = load(options)
    bench.notes.note(f"teacher on {len(data)} images")
    reference = float_logits(loaded, data, bench.results / FLOATS)
    labels = torch.from_numpy(data.labels)
    for number, key in enumerate(missing, 1):
        name = f"{key['comparison']}, {key['source']}, seed {key['seed']}"
        bench.notes.note(f"{number} of {len(missing)}: {name}")
        with tempfile.TemporaryDirectory(dir=scratch(bench)) as directory:
            made, count, effort = _images(options, key, Path(directory))
            result = _distill(options, key, made.path, count, Path(directory))
            student = dfq.load_model(result.path)
            outputs = logits(student.vit.eval(), data, student.preprocessing)
        cost = {"invert_seconds": made.seconds, "dataset_bytes": made.bytes, **effort}
        trained = {
            "made": count,
            "train_seconds": result.training_seconds,
            "parameters": result.parameters,
            "began_with": result.start,
            "first_loss": result.losses[0],
            "last_loss": result.losses[-1],
        }
        yield Measured(
            key,
            {
                **cost,
                **trained,
                **compare(outputs, reference, labels),
                **_by_class(outputs, reference, labels, key["one_class"]),
            },
        )


def _images(options: Options, key: Key, place: Path) -> tuple[Made, int, Row]:
    """Make the images of a key; return them with their number and the measured unit of work."""
    key = {**key, "classes": _classes(key["one_class"])}
    real = _real(options, key["classes"]) if key["real"] else None
    count, effort = key["images"], {}
    if count is None:
        unit, seconds = _unit(options, key, place)
        count = unit * max(1, int(key["budget"] / seconds))
        effort = {"unit_images": unit, "unit_seconds": seconds}
    made = make(options, load(options)[0], real, {**key, "images": count}, place / "set")
    return made, count, effort


def _unit(options: Options, key: Key, place: Path) -> tuple[int, float]:
    """Return the number of images of a unit of work and its seconds, after an untimed one."""
    method = Method(Source(key["source"]).base)
    one = {**key, "images": method.images}
    settings = inversion(method, one, iterations=key["iterations"], seed=key["seed"])
    count = settings.unit_size * method.images
    seconds = 0.0
    for name in ("untimed", "unit"):
        part = {**key, "images": count}
        seconds = make(options, load(options)[0], None, part, place / name).seconds
    return count, seconds


def _distill(options: Options, key: Key, data: str, count: int, place: Path) -> DistillResult:
    """Train a student on the images in ``data``."""
    training = {"steps": key["steps"], "batch": key["batch"], "seed": key["seed"]}
    added: dict[str, Any] = {} if Source(key["source"]).augmented else NO_AUGMENTATION
    return dfq.distill(
        options.model,
        student=key["student"],
        depth=key["depth"],
        width=key["width"],
        heads=key["heads"],
        start=key["start"],
        data=data,
        images=count,
        out=place / "student",
        settings={"distillation": {**training, **added}},
        cache=place,
        **model_arguments(options),
    )


def _by_class(
    outputs: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor, one: int | None
) -> Row:
    """Return accuracies of student and teacher on the images' class and on the others, and the
    number of other classes with a correct prediction of the student."""
    if one is None:
        return {}
    own = labels == one
    top, teacher = outputs.argmax(-1), reference.argmax(-1)
    right = top == labels
    return {
        "own_accuracy": _share(right[own]),
        "others_accuracy": _share(right[~own]),
        "teacher_others_accuracy": _share((teacher == labels)[~own]),
        "others_found": len(labels[right & ~own].unique()),
        "others": len(labels[~own].unique()),
    }


def _share(right: torch.Tensor) -> float | None:
    return float(right.double().mean()) if len(right) else None


EXPERIMENT = Experiment(Options, plan, measure, transfer_tables)
