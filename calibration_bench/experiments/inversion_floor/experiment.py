"""Lower bound of the time of an iteration on this processor, and the measured time.

The bound: every matrix product of an iteration at the rate that its shape reaches when it is
repeated alone, and at least the time to read the weights and pixels from memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from calibration_bench.core.options import at_least, option, words
from calibration_bench.core.profiling import shares
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.core.tables import floor_tables
from calibration_bench.measure import ours
from calibration_bench.measure.counting import compulsory_bytes, operations, products, unfused_bytes
from calibration_bench.measure.measure import MB, Stages
from calibration_bench.measure.methods import Method, random_model, stages
from calibration_bench.measure.rates import best_rate, copy_rate, product_seconds
from dfq import InversionSettings, LoadedModel
from dfq.device import LARGEST_WEIGHT, resolve_precision
from dfq.errors import SettingError

MODELS = "vit_small_patch16_224,vit_base_patch16_224,vit_small_patch14_dinov2@224"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """Options of ``run inversion-floor``."""

    models: str = option(MODELS, "timm models with random weights; NAME@SIDE sets the image size.")
    methods: str = option("pri4,smi", "Methods whose stages are measured.")
    unit_size: int = option(InversionSettings().unit_size, "Trajectories optimized at once.")
    precision: str = option("auto", "Precision of inversion: auto, float32 or bfloat16.")
    iterations_per_stage: int = option(
        8, "Iterations per stage, timed once and profiled once, including the warm-up."
    )
    warmup: int = option(2, "Untimed first iterations of each stage.")
    seconds_per_shape: float = option(
        0.3, "Seconds to measure the rate of each shape of a matrix product."
    )
    threads: int | None = option(None, "CPU threads; by default PyTorch's number.")
    seed: int = option(0, "Seed of weights, noise and jitter.")


def plan(options: Options, _: Bench) -> list[Key]:
    """Return a key for each model, method and stage."""
    at_least(options.iterations_per_stage, options.warmup + 1, "--iterations-per-stage")
    if options.precision in LARGEST_WEIGHT:
        raise SettingError(
            f"--precision is {options.precision}; the bound is known for float32 and bfloat16 only."
        )
    return [
        {
            "model": model,
            "method": method.name,
            "stage": stage,
            "batch": options.unit_size,
            "precision": resolve_precision(options.precision, torch.device("cpu")),
            "threads": options.threads or torch.get_num_threads(),
            "iterations_per_stage": options.iterations_per_stage,
            "warmup": options.warmup,
            "seed": options.seed,
        }
        for model in words(options.models, "--models")
        for method in map(Method, words(options.methods, "--methods"))
        for stage in range(method.stages)
    ]


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Measure the processor first, then the stages of each model and method."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    bench.notes.note("measuring the processor")
    processor = _processor(options.seconds_per_shape)
    for model in dict.fromkeys(key["model"] for key in missing):
        loaded = random_model(model, options.seed)
        mine = [key for key in missing if key["model"] == model]
        for method in dict.fromkeys(key["method"] for key in mine):
            bench.notes.note(f"{model} {method}")
            keys = [key for key in mine if key["method"] == method]
            yield from _stages(loaded, keys, options, processor)


def _processor(budget: float) -> Row:
    """Return the highest rates of matrix products in TFLOP/s, and of copies in GB/s."""
    rates = {f"best_tflops_{n}": best_rate(t, 4 * budget) / 1e12 for n, t in TYPES.items()}
    return {**rates, "copy_gb_per_second": copy_rate(4 * budget) / 1e9}


def _stages(
    loaded: LoadedModel, keys: list[Key], options: Options, processor: Row
) -> Iterator[Measured]:
    settings = _settings(keys[0])
    timed = Stages(options.warmup, [ours.run(loaded, settings, "cpu")])
    where = shares(loaded, settings, options.warmup)
    timed.traces.append(ours.run(loaded, settings, "cpu"))
    live = [stage.live for stage in stages(settings, loaded.vit.arch.grid.patches)]
    for key in keys:
        at = key["stage"]
        floor = _floor(loaded, live[at], key, options.seconds_per_shape, processor)
        achieved = timed.seconds()[at]
        timing = {
            "achieved_seconds": achieved,
            "achieved_over_possible": achieved / floor["possible_seconds"],
            "achieved_tflops": floor["operations"] / achieved / 1e12,
            "shares": where[at],
        }
        yield Measured(key, {**processor, **floor, **timing})


def _settings(key: Key) -> InversionSettings:
    given: dict[str, Any] = {name: key[name] for name in ("precision", "threads", "seed")}
    method = Method(key["method"])
    return method.short(
        method.settings(unit_size=key["batch"], **given), key["iterations_per_stage"]
    )


def _floor(loaded: LoadedModel, live: int, key: Key, budget: float, processor: Row) -> Row:
    """Return operations, bytes, and the lower bound of an iteration in seconds."""
    arch, batch, precision = loaded.vit.arch, key["batch"], key["precision"]
    needed = products(arch, live, batch)
    alone = {f"matmul_seconds_{n}": product_seconds(needed, t, budget) for n, t in TYPES.items()}
    size = TYPES[precision].itemsize
    least, count = compulsory_bytes(arch, live, batch, size), operations(arch, live, batch)
    memory = least / processor["copy_gb_per_second"] / 1e9
    return {
        "live": live,
        "operations": count,
        "compulsory_mb": least / MB,
        "unfused_mb": unfused_bytes(arch, live, batch, size) / MB,
        **alone,
        "memory_seconds": memory,
        "best_rate_seconds": count / processor[f"best_tflops_{precision}"] / 1e12,
        "possible_seconds": max(alone[f"matmul_seconds_{precision}"], memory),
    }


EXPERIMENT = Experiment(Options, plan, measure, floor_tables)
