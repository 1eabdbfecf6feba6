"""Evolution of trajectories: confidence, features, attention and loss by stage."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import dfq
from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.experiments.evolution.tables import evolution_plots, evolution_tables
from calibration_bench.measure import ours
from calibration_bench.measure.features import (
    ClassMeans,
    block_features,
    confidence,
    filled,
    network_input,
    real_input,
)
from calibration_bench.measure.logits import LabeledImages
from calibration_bench.measure.methods import Method
from calibration_bench.measure.quantized import ModelOptions, about, load, scratch
from calibration_bench.measure.variants import VARIANTS
from calibration_bench.measure.watching import Recorder, draw_attention, kept_share
from dfq import InversionSettings, LoadedModel, SparseImages
from dfq.errors import SettingError
from dfq.files import safe_name
from dfq.inversion import plan_units, ranking_of

PICTURES = "pictures"


@dataclass(frozen=True)
class Options(ModelOptions):
    """Options of ``run evolution``."""

    methods: str = option(
        "pri4,pri-random,pri-least,smi,dmi",
        "Inversion methods, and variants of `run rebirth` as controls.",
    )
    stages: int = option(4, "Stages (v) of the variants.")
    trajectories: int = option(8, "Trajectories of every method.")
    iterations: int = option(InversionSettings().iterations, "Iterations of a trajectory.")
    limit: int | None = option(512, "Number of real images to compare with, the first of --data.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return a key for each method and seed, and one for real images."""
    at_least(options.limit, 2, "--limit")
    at_least(options.trajectories, 1, "--trajectories")
    at_least(options.stages, 1, "--stages")
    methods = {name: _images(name, options.stages) for name in words(options.methods, "--methods")}
    deepest = max(methods.values())
    if options.iterations < deepest:
        raise SettingError(f"--iterations is {options.iterations}; it must be at least {deepest}.")
    bench.notes.note(f"loading {options.model} and {options.data}")
    loaded, data = load(options)
    shared = about(options, loaded, data)
    effort = {"trajectories": options.trajectories, "iterations": options.iterations}
    made = [
        {**shared, **effort, "source": name, "stages": stages, "seed": seed}
        for seed in numbers(options.seeds, "--seeds")
        for name, stages in methods.items()
    ]
    for key in made:
        plan_units(_settings(key), loaded.vit.arch.grid.patches)
    none = {"trajectories": 0, "iterations": 0, "stages": 1}
    return [{**shared, **none, "source": "real", "seed": 0}, *made]


def _images(name: str, v: int) -> int:
    """Return the number of images of a trajectory."""
    if name == "noise":
        raise SettingError(
            "--methods names 'noise', which has no iterations to record. Leave it out."
        )
    if name not in VARIANTS:
        return Method(name).images
    return 1 if name in ("dmi", "smi", "smi-reranked") else v


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Run one method and seed after the other; pictures of PRI are saved with the results."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    loaded, data = load(options)
    bench.notes.note("features of real images")
    half = range(0, len(data), 2)
    means = ClassMeans(loaded, data, half)
    for number, key in enumerate(missing, 1):
        bench.notes.note(f"{number} of {len(missing)}: {key['source']}, seed {key['seed']}")
        if key["source"] == "real":
            yield Measured(key, {"stages": [_real(loaded, data, means)], "losses": [], "live": []})
        else:
            yield Measured(key, _trajectories(loaded, means, key, bench))


def _real(loaded: LoadedModel, data: LabeledImages, means: ClassMeans) -> Row:
    """Describe the half of the real images that is not in the class means."""
    indices = range(1, len(data), 2)
    labels = torch.from_numpy(data.labels[list(indices)])
    batches = list(real_input(loaded, data, indices))
    with torch.no_grad():
        outputs = torch.cat([loaded.vit.forward_sparse(x) for x in batches])
    features = torch.cat([block_features(loaded.vit, x) for x in batches], dim=1)
    return {
        "stage": None,
        "after": None,
        "images": len(indices),
        **confidence(outputs, labels),
        **_cosines(means, features, labels),
    }


def _cosines(means: ClassMeans, features: torch.Tensor, labels: torch.Tensor) -> Row:
    """Return cosines by block; None if there are no real images of the classes."""
    cosines = dict(zip(("own", "others"), means.cosines(features, labels), strict=True))
    return {
        name: [None if math.isnan(x) else x for x in values.tolist()]
        for name, values in cosines.items()
    }


def _settings(key: Key) -> InversionSettings:
    given = {name: key[name] for name in ("precision", "threads", "seed")}
    given["images"] = key["trajectories"] * key["stages"]
    if key["source"] in VARIANTS:
        variant = VARIANTS[key["source"]]
        return variant.settings(key["stages"], key["iterations"], **given)
    return Method(key["source"]).settings(iterations=key["iterations"], **given)


def _trajectories(loaded: LoadedModel, means: ClassMeans, key: Key, bench: Bench) -> Row:
    """Run all trajectories of a method with a callback, and describe their images by stage."""
    settings, units, recorders = _settings(key), [], []
    importance = ranking_of(settings, loaded.vit.arch)
    by_attention = settings.method == "pri" and importance == "attention"
    for unit in plan_units(settings, loaded.vit.arch.grid.patches):
        recorders.append(Recorder(unit.trajectories))
        units.append(ours.unit_images(loaded, settings, unit, recorders[-1]))
    by_stage = [[unit[stage] for unit in units] for stage in range(len(units[0]))]
    described: list[Row] = []
    for stage, batches in enumerate(by_stage):
        shares = [
            (r.trajectories, kept_share(importance, leaving))
            for r in recorders
            for importance, _, leaving in r.rankings[stage : stage + 1]
        ]
        described.append(
            {
                **_stage(loaded, means, batches),
                "stage": stage + 1,
                "attention": _weighted(shares) if shares and by_attention else None,
            }
        )
    weights = [recorder.trajectories for recorder in recorders]
    losses = [
        _weighted(list(zip(weights, values, strict=True)))
        for values in zip(*(recorder.losses for recorder in recorders), strict=True)
    ]
    pictures = _draw(loaded, units, recorders[0], key, bench) if settings.method == "pri" else []
    return {"stages": described, "losses": losses, "live": recorders[0].live, "pictures": pictures}


def _weighted(parts: list[tuple[int, float]]) -> float:
    """Return the weighted mean of values."""
    return sum(weight * value for weight, value in parts) / sum(weight for weight, _ in parts)


def _stage(loaded: LoadedModel, means: ClassMeans, batches: list[SparseImages]) -> Row:
    labels = torch.cat([batch.labels for batch in batches])
    inputs = [(network_input(loaded, batch), batch.positions) for batch in batches]
    with torch.no_grad():
        outputs = torch.cat([loaded.vit.forward_sparse(*given) for given in inputs])
    features = torch.cat([block_features(loaded.vit, *given) for given in inputs], dim=1)
    dense = confidence(torch.cat([filled(loaded, batch) for batch in batches]), labels)
    return {
        "images": len(labels),
        **confidence(outputs, labels),
        **{f"filled_{name}": value for name, value in dense.items()},
        **_cosines(means, features, labels),
    }


def _draw(
    loaded: LoadedModel,
    units: list[list[SparseImages]],
    recorder: Recorder,
    key: Key,
    bench: Bench,
) -> list[str]:
    """Draw a run's first trajectories; return the names of the files."""
    model = safe_name(str(key["model"]))
    name = f"{model}-{key['source']}-v{key['stages']}-T{key['iterations']}-seed{key['seed']}"
    place = bench.results / PICTURES
    with tempfile.TemporaryDirectory(dir=scratch(bench)) as directory:
        path = Path(directory) / "images"
        dfq.write_dataset(path, units, loaded, origin="evolution")
        dfq.preview(path, place / f"{name}-images.png")
    names = [f"{PICTURES}/{name}-images.png"]
    if recorder.rankings:
        draw_attention(recorder.rankings, loaded.vit.arch.grid, place / f"{name}-attention.png")
        names.append(f"{PICTURES}/{name}-attention.png")
    return names


EXPERIMENT = Experiment(Options, plan, measure, evolution_tables, evolution_plots)
