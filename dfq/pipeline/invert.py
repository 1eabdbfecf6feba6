"""``dfq.invert``: inversion of a model into a sparse-image dataset."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from dfq.arguments import checked
from dfq.device import resolve_device
from dfq.inversion.schedule import fit_stages
from dfq.pipeline.synthesis import make_dataset
from dfq.progress import Progress, note_all, resolve_progress, warn
from dfq.recipe import Recipe, is_set, make_recipe, merge_arguments
from dfq.results.values import InvertResult
from dfq.slow import slow_floats
from dfq.vit.load import LoadedModel, load_model
from dfq.vit.options import LoadOptions


@checked
def invert(
    model: str | nn.Module | LoadedModel,
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
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: Progress | bool | None = None,
    **options: Unpack[LoadOptions],
) -> InvertResult:
    """Invert a model into a sparse-image dataset, in the cache or in ``out``.

    Args:
        model, weights, num_classes, img_size, in_chans, global_pool, mean, std, input_range: see
            :func:`dfq.load_model`.
        method: ``pri``, ``smi``, ``dmi`` or ``noise``.
        images: number of images.
        iterations: number of iterations of a trajectory.
        stages: ``pri``: images a trajectory yields; by default 4, or fewer where there are fewer
            patches or iterations.
        out: directory of the dataset; by default it is kept in the cache.
        seed: of noise, targets and jitter.
        threads: of the optimization; torch's by default.
        precision: ``auto``, ``float32``, ``bfloat16``, ``int8`` or ``int7``.
        recipe: a TOML file, the name of a recipe that ships with dfq, or a
            :class:`dfq.Recipe`; the arguments override it.
        settings: further fields of :class:`dfq.InversionSettings` to override.

    Raises:
        DfqError: one of its subclasses says what is wrong.
    """
    overrides = merge_arguments(
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
    target, progress = resolve_device(device), resolve_progress(progress)
    if chosen.method != "noise":
        warn(progress, slow_floats(target, inversion=chosen.precision))
    loaded = load_model(model, **options).frozen(target)
    note_all(progress, loaded.notes)
    if not is_set("stages", stages, settings, recipe):
        chosen = fit_stages(chosen, loaded.vit.arch.grid.patches)
    started = time.perf_counter()
    dataset, cached = make_dataset(
        loaded,
        chosen,
        out=None if out is None else Path(out),
        device=target,
        cache=cache,
        progress=progress,
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
