"""Statistics of inverted images, compared with DMI, with real images and among themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dfq
from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.experiments.image_statistics.tables import statistics_tables
from calibration_bench.measure import ours
from calibration_bench.measure.features import network_input, real_input
from calibration_bench.measure.methods import Method
from calibration_bench.measure.quantized import ModelOptions, about, check_inversion, load, scratch
from calibration_bench.measure.similarity import distances, input_moments, psnr, spearman, ssim
from calibration_bench.measure.sources import NOT_INVERTED, RealImages, Source, make
from dfq import InversionSettings, LoadedModel, SparseImages
from dfq.errors import SettingError
from dfq.inversion import importance_of, make_objective, plan_units, seeded

MEASURES = ("attention", "gradient", "activation", "random")


@dataclass(frozen=True)
class Options(ModelOptions):
    """Options of ``run image-statistics``."""

    methods: str = option("pri2,pri4,pri7", "Variants of PRI to compare with DMI, patch by patch.")
    trajectories: int = option(8, "Trajectories of that comparison.")
    snapshots: int = option(4, "Snapshots of DMI between which rankings are compared.")
    sources: str = option(
        "real,noise,uniform,fractal,dmi,smi,pri2,pri4,pri7",
        "Sources whose activations are compared.",
    )
    real: str | None = option(
        None,
        "Images of the source real: a folder or .npz; by default those of --data after --limit.",
    )
    images: int = option(16, "Images of each source.")
    iterations: int = option(InversionSettings().iterations, "Iterations of a trajectory.")
    limit: int | None = option(256, "Number of real images to compare with, the first of --data.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return the keys by seed: each method, DMI's rankings, and each source."""
    for name in ("limit", "trajectories", "snapshots", "images"):
        at_least(getattr(options, name), 1, f"--{name}")
    methods = [Method(name) for name in words(options.methods, "--methods")]
    if not all(method.name.startswith("pri") for method in methods):
        raise SettingError(
            "--methods are compared with DMI patch by patch; give variants of PRI alone."
        )
    sources = [Source(name) for name in words(options.sources, "--sources")]
    if any(source.augmented for source in sources):
        raise SettingError("--sources are compared without augmentation; leave +coverage out.")
    deepest = max([options.snapshots, *(method.images for method in methods)])
    if options.iterations < deepest:
        raise SettingError(f"--iterations is {options.iterations}; it must be at least {deepest}.")
    bench.notes.note(f"loading {options.model} and {options.data}")
    loaded, tested = load(options)
    shared = about(options, loaded, tested)
    seeds = numbers(options.seeds, "--seeds")
    real: dict[int, str] = {}
    if any(source.name == "real" for source in sources):
        images = _real(options)
        real = {seed: images.identity(options.images, seed, tested) for seed in seeds}
    for source in sources:
        check_inversion(source.base, shared, options.images, options.iterations, loaded)
    effort = {"trajectories": options.trajectories, "iterations": options.iterations}
    keys: list[Key] = []
    for seed in seeds:
        keys += [
            {**shared, "kind": "fidelity", "source": method.name, **effort, "seed": seed}
            for method in methods
        ]
        snapshots = {"snapshots": options.snapshots, **effort}
        keys.append({**shared, "kind": "ranking", "source": "dmi", **snapshots, "seed": seed})
        keys += [
            {
                **shared,
                "kind": "activations",
                "source": source.name,
                "real": real.get(seed) if source.name == "real" else None,
                "images": options.images,
                "iterations": 0 if source.name in NOT_INVERTED else options.iterations,
                "seed": seed,
            }
            for source in sources
        ]
    return keys


def _real(options: Options) -> RealImages:
    return RealImages(load(options)[0], options.real, options.data, options.limit)


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Measure row by row; the statistics of real images are computed once."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    loaded, data = load(options)
    reference, real = None, None
    if any(key["kind"] == "activations" for key in missing):
        bench.notes.note(f"activations of {len(data)} real images")
        batches = real_input(loaded, data, range(len(data)))
        reference = input_moments(loaded.vit, ((x, None) for x in batches))
    if any(key["source"] == "real" for key in missing):
        real = _real(options)
    for number, key in enumerate(missing, 1):
        what = f"{key['kind']} of {key['source']}, seed {key['seed']}"
        bench.notes.note(f"{number} of {len(missing)}: {what}")
        if key["kind"] == "fidelity":
            row = _fidelity(loaded, key)
        elif key["kind"] == "ranking":
            row = _ranking(loaded, key)
        else:
            assert reference is not None
            with tempfile.TemporaryDirectory(dir=scratch(bench)) as directory:
                made = make(options, loaded, real, key, Path(directory) / "images")
                dataset = dfq.SparseImageDataset(made.path)
                inputs = ((network_input(loaded, b), b.positions) for b in dataset.batches(8))
                moments = input_moments(loaded.vit, inputs)
            row = {"layers": {n: distances(moments[n], reference[n]) for n in reference}}
        yield Measured(key, row)


def _settings(key: Key, **changes: Any) -> InversionSettings:
    """Attention decides whatever the model: it draws no random numbers, so that the jitter
    of PRI and DMI stays the same."""
    return InversionSettings(
        iterations=key["iterations"],
        precision=key["precision"],
        threads=key["threads"],
        seed=key["seed"],
        importance="attention",
        **changes,
    )


def _dmi(loaded: LoadedModel, key: Key, snapshots: int) -> list[list[SparseImages]]:
    count = key["trajectories"] * snapshots
    return ours.images(loaded, _settings(key, method="dmi", snapshots=snapshots, images=count))


def _fidelity(loaded: LoadedModel, key: Key) -> Row:
    """Compare kept patches with DMI's at the same positions, at that iteration and at the end."""
    v = Method(key["source"]).images
    pri = ours.images(loaded, _settings(key, stages=v, images=key["trajectories"] * v))
    dmi = _dmi(loaded, key, v)
    stages = []
    for stage in range(v):
        kept = torch.cat([unit[stage].patches for unit in pri])
        then, end = (
            torch.cat([_at(d[n], p[stage]) for d, p in zip(dmi, pri, strict=True)])
            for n in (stage, v - 1)
        )
        stages.append(
            {
                "stage": stage + 1,
                "patches": kept.shape[0] * kept.shape[1],
                "identical": bool(torch.equal(kept, then)),
                "psnr_then": psnr(kept, then),
                "ssim_then": ssim(kept, then),
                "psnr_end": psnr(kept, end),
                "ssim_end": ssim(kept, end),
            }
        )
    return {"stages": stages}


def _at(whole: SparseImages, part: SparseImages) -> Tensor:
    """Return the patches of whole images at the positions of sparse images."""
    index = part.positions[..., None].expand_as(part.patches)
    return whole.patches.gather(1, index)


def _ranking(loaded: LoadedModel, key: Key) -> Row:
    """Compute rank correlations of importance between DMI's snapshots and between measures."""
    settings = _settings(key, method="dmi", images=key["trajectories"])
    units = _dmi(loaded, key, key["snapshots"])
    firsts = plan_units(settings, loaded.vit.arch.grid.patches)
    maps: list[dict[str, Tensor]] = []
    for shot in range(key["snapshots"]):
        parts = [
            _importance(loaded, unit[shot], key["seed"], plan.first_trajectory)
            for unit, plan in zip(units, firsts, strict=True)
        ]
        maps.append({m: torch.cat([part[m] for part in parts]) for m in MEASURES})
    last = maps[-1]
    return {
        "over_time": [_mean(shot["attention"], last["attention"]) for shot in maps],
        "measures": {
            f"{a}, {b}": _mean(last[a], last[b])
            for i, a in enumerate(MEASURES)
            for b in MEASURES[i + 1 :]
        },
        "labels": torch.cat([unit[0].labels for unit in units]).tolist(),
        "attention": [[float(f"{x:.4g}") for x in row] for row in last["attention"].tolist()],
    }


def _importance(
    loaded: LoadedModel, images: SparseImages, seed: int, first: int
) -> dict[str, Tensor]:
    x = network_input(loaded, images)
    objective = make_objective(loaded.vit.arch, seed, first, len(images))
    generator = seeded(seed, "ranking", first)
    importances: dict[str, Tensor] = {}
    for measure in MEASURES:
        given: Any = measure
        importances[measure] = importance_of(
            given, loaded.vit, x, images.positions, objective, generator
        )
    return importances


def _mean(a: Tensor, b: Tensor) -> float | None:
    """Return the mean rank correlation of the rows of two tables."""
    correlations = [spearman(x, y) for x, y in zip(a, b, strict=True)]
    known = [value for value in correlations if value is not None]
    return sum(known) / len(known) if known else None


EXPERIMENT = Experiment(Options, plan, measure, statistics_tables)
