"""Cost of inversion on models of all sizes and families, with random weights.

Speed does not depend on the weights.  A few iterations of every stage are timed, the methods in
turns, and extrapolated to whole runs as in ``inversion-speed``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import dfq
from calibration_bench.core.options import at_least, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.experiments.across_models.tables import model_plots, model_tables
from calibration_bench.experiments.inversion_speed.experiment import Contender
from calibration_bench.measure.methods import Method, patch_updates, random_model
from dfq import InversionSettings, LoadedModel
from dfq.device import resolve_device, resolve_products
from dfq.inversion import resolve_importance

MODELS = (
    "demo",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2@224",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
)


@dataclass(frozen=True)
class Options:
    """Options of ``run across-models``."""

    models: str = option(
        ",".join(MODELS), "timm models with random weights; NAME@SIDE sets the image size; or demo."
    )
    methods: str = option("dmi,smi,pri4", "Methods.")
    unit_size: int = option(2, "Trajectories optimized at once.")
    iterations: int = option(
        InversionSettings().iterations, "Iterations of the full run that is extrapolated to."
    )
    iterations_per_stage: int = option(
        3, "Iterations per stage in every round, including the warm-up."
    )
    warmup: int = option(1, "Untimed first iterations of each stage.")
    rounds: int = option(1, "Number of rounds.")
    precision: str = option("auto", "Precision of inversion: auto, float32, bfloat16 or int8.")
    threads: int | None = option(None, "CPU threads; by default PyTorch's number.")
    device: str = option("cpu", "Device: cpu, cuda, ...")
    seed: int = option(0, "Seed of weights, noise and jitter.")


def plan(options: Options, _: Bench) -> list[Key]:
    """Return a key for each model and method."""
    at_least(options.iterations_per_stage, options.warmup + 1, "--iterations-per-stage")
    at_least(options.rounds, 1, "--rounds")
    at_least(options.iterations, 1, "--iterations")
    device = resolve_device(options.device)
    return [
        {
            "model": model,
            "implementation": "dfq",
            "method": Method(name).name,
            "iterations": options.iterations,
            "batch": options.unit_size,
            "precision": resolve_products(options.precision, device),
            "threads": options.threads or torch.get_num_threads(),
            "device": str(device),
            "seed": options.seed,
            "iterations_per_stage": options.iterations_per_stage,
            "warmup": options.warmup,
            "rounds": options.rounds,
        }
        for model in words(options.models, "--models")
        for name in words(options.methods, "--methods")
    ]


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Measure one model after the other; the methods of a model take turns."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    for model in dict.fromkeys(key["model"] for key in missing):
        bench.notes.note(f"making {model}")
        loaded = dfq.load_model("demo") if model == "demo" else random_model(model, options.seed)
        contenders = [Contender(k, loaded, None) for k in missing if k["model"] == model]
        for number in range(options.rounds):
            for contender in contenders:
                bench.notes.note(f"round {number + 1} of {options.rounds}: {contender.name}")
                contender.short()
        for contender in contenders:
            yield Measured(contender.key, {**_about(loaded, contender), **contender.row()})


def _about(loaded: LoadedModel, contender: Contender) -> Row:
    """Return the size of the model and the patch updates of the method."""
    arch = loaded.vit.arch
    return {
        "parameters": sum(p.numel() for p in loaded.vit.parameters()),
        "patches": arch.grid.patches,
        "depth": arch.depth,
        "width": arch.embed_dim,
        "pool": arch.pool,
        "importance": resolve_importance("auto", arch),
        "updates_per_image": patch_updates(contender.settings, arch.grid.patches)
        / contender.images,
    }


EXPERIMENT = Experiment(Options, plan, measure, model_tables, model_plots)
