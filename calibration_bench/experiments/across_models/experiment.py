"""What inversion costs on models of all sizes and kinds; speed does not depend on weights.

A few iterations of every stage are timed, method after method, and whole runs follow from
them as in ``inversion-speed``.
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
    """What ``run across-models`` takes."""

    models: str = option(
        ",".join(MODELS), "timm names, with random weights; NAME@SIDE for another input; demo."
    )
    methods: str = option("dmi,smi,pri4", "Methods.")
    unit_size: int = option(2, "Trajectories at once.")
    iterations: int = option(
        InversionSettings().iterations, "Of a trajectory that is extrapolated to."
    )
    iterations_per_stage: int = option(3, "Timed in every round, with the warm-up.")
    warmup: int = option(1, "First iterations of each stage that do not count.")
    rounds: int = option(1, "How often each is run.")
    precision: str = option("auto", "auto, float32, bfloat16, int8.")
    threads: int | None = option(None, "Threads; left out: torch's.")
    device: str = option("cpu", "cpu, cuda, ...")
    seed: int = option(0, "Of weights, noise and jitter.")


def plan(options: Options, _: Bench) -> list[Key]:
    """One key for each model and method."""
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
    """Model by model; its methods take turns."""
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
    """What a model is, and what a method does to it."""
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
