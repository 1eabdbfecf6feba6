"""Time and memory per image of dfq and of the official code of SMI.

In every round each implementation and method does a short run, so that a slower machine affects
all of them.  A full run is extrapolated from the median iteration of each stage and the lengths
of its stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from calibration_bench.core import memory
from calibration_bench.core.options import at_least, numbers, option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.core.tables import speed_tables
from calibration_bench.measure import ours
from calibration_bench.measure.counting import operations
from calibration_bench.measure.measure import Stages, Trace
from calibration_bench.measure.methods import Method, Stage, random_model, stages
from calibration_bench.measure.official import METHODS as OFFICIAL_METHODS
from calibration_bench.measure.official import Official, code
from dfq import InversionSettings, LoadedModel
from dfq.device import resolve_device, resolve_products
from dfq.errors import RunError, SettingError
from dfq.failures import explained, first_line
from dfq.recipe import Products

IMAGES = 32
IMPLEMENTATIONS = ("dfq", "official", "official-frozen")


@dataclass(frozen=True)
class Options:
    """Options of ``run inversion-speed``."""

    models: str = option(
        "vit_base_patch16_224,deit_small_patch16_224", "timm models with random weights."
    )
    methods: str = option(
        "dmi,smi,pri2,pri4,pri7", "Inversion methods; the official code has dmi and smi."
    )
    implementations: str = option(",".join(IMPLEMENTATIONS), "Implementations to measure.")
    official: Path | None = option(None, "Checkout of Egg-Hu/SMI; without it only dfq is measured.")
    official_batch: int = option(8, "Batch size of the official code.")
    unit_size: int = option(
        InversionSettings().unit_size, "Trajectories that dfq optimizes at once."
    )
    precision: str = option(
        "auto", "Precisions of dfq: auto, float32, bfloat16, int8; the official code has float32."
    )
    iterations: int = option(4000, "Iterations of the full run that is extrapolated to.")
    iterations_per_stage: int = option(
        12, "Iterations per stage in every round, including the warm-up."
    )
    warmup: int = option(2, "Untimed first iterations of each stage.")
    rounds: int = option(2, "Number of rounds.")
    memory: bool = option(True, "Also measure peak memory.")
    threads: int | None = option(None, "CPU threads; by default PyTorch's number.")
    device: str = option("cpu", "Device: cpu, cuda, ...")
    seed: int = option(0, "Seed of weights, noise and jitter.")
    check_extrapolation: bool = option(
        False, "Only compare extrapolated with measured times, on full runs of few iterations."
    )
    check_models: str = option(
        "deit_small_patch16_224", "Models of that comparison, with random weights."
    )
    check_iterations: str = option("200", "Iterations of the runs of that comparison.")


def plan(options: Options, bench: Bench) -> list[Key]:
    """Return a key for each model, implementation, precision and method."""
    at_least(options.iterations_per_stage, options.warmup + 1, "--iterations-per-stage")
    at_least(options.rounds, 1, "--rounds")
    at_least(options.official_batch, 1, "--official-batch")
    implementations = words(options.implementations, "--implementations", IMPLEMENTATIONS)
    if options.official is None and implementations != ["dfq"]:
        bench.notes.note("No --official DIR: rows of the official code are left out.")
        implementations = [i for i in implementations if i == "dfq"]
    methods = [Method(name) for name in words(options.methods, "--methods")]
    if options.check_extrapolation:
        return _check_keys(options, implementations)
    return [
        _key(options, model, implementation, precision, method, options.iterations)
        for model in words(options.models, "--models")
        for implementation in implementations
        for precision in _precisions(options, implementation)
        for method in methods
        if implementation == "dfq" or method.name in OFFICIAL_METHODS
    ]


def _precisions(options: Options, implementation: str) -> list[str]:
    """Return the resolved precisions of an implementation; the official code has one."""
    if implementation != "dfq":
        return ["float32"]
    device = resolve_device(options.device)
    given = words(options.precision, "--precision", get_args(Products))
    return list(dict.fromkeys(resolve_products(name, device) for name in given))


def _check_keys(options: Options, implementations: list[str]) -> list[Key]:
    return [
        {
            **_key(
                options, model, name, precision, Method("pri4" if name == "dfq" else "smi"), total
            ),
            **CHECK,
        }
        for total in numbers(options.check_iterations, "--check-iterations", 8)
        for model in words(options.check_models, "--check-models")
        for name in implementations
        for precision in _precisions(options, name)
    ]


CHECK = {"kind": "check", "memory": False}


def _key(
    options: Options,
    model: str,
    implementation: str,
    precision: str,
    method: Method,
    iterations: int,
) -> Key:
    device = resolve_device(options.device)
    own = implementation == "dfq"
    return {
        "kind": "speed",
        "model": model,
        "implementation": implementation,
        "method": method.name,
        "iterations": iterations,
        "batch": options.unit_size if own else options.official_batch,
        "precision": precision,
        "threads": options.threads or torch.get_num_threads(),
        "device": str(device),
        "seed": options.seed,
        "iterations_per_stage": options.iterations_per_stage,
        "warmup": options.warmup,
        "rounds": options.rounds,
        "memory": options.memory,
        "official_code": None if own or options.official is None else code(options.official),
    }


class Contender:
    """Implementation of a method on a model, measured by short runs."""

    def __init__(self, key: Key, loaded: LoadedModel, official: Official | None) -> None:
        self.key, self.loaded, self.official = key, loaded, official
        self.method = Method(key["method"])
        self.settings = self.method.settings(
            iterations=key["iterations"],
            unit_size=key["batch"],
            images=key["batch"] * self.method.images,
            precision=key["precision"],
            threads=key["threads"],
            seed=key["seed"],
        )
        self.runs = Stages(key["warmup"])

    @property
    def name(self) -> str:
        names = ("model", "implementation", "method", "precision")
        return " ".join(self.key[name] for name in names)

    @property
    def images(self) -> int:
        """Number of images of a run."""
        return int(self.key["batch"]) * self.method.images

    def stages(self) -> list[Stage]:
        if self.key["implementation"] == "dfq":
            return stages(self.settings, self.loaded.vit.arch.grid.patches)
        assert self.official is not None
        return self.official.stages(self.settings)

    def run(self, settings: InversionSettings) -> Trace:
        if self.key["implementation"] == "dfq":
            return ours.run(self.loaded, settings, self.key["device"])
        assert self.official is not None
        frozen = self.key["implementation"] == "official-frozen"
        return self.official.run(settings, frozen=frozen)

    def short(self) -> None:
        """Do one more short run."""
        settings = self.method.short(self.settings, self.key["iterations_per_stage"])
        self.runs.traces.append(self.run(settings))

    def row(self) -> Row:
        """Return the row of a full run, extrapolated from the short runs so far."""
        real, seconds = self.stages(), self.runs.seconds()
        total = self.runs.predict([stage.length for stage in real])
        batch, arch = self.key["batch"], self.loaded.vit.arch
        done = sum(stage.length * operations(arch, stage.live, batch) for stage in real)
        return {
            "seconds_per_image": total / self.images,
            "peak_memory_mb": None,
            "images_per_trajectory": self.method.images,
            "overhead_seconds_per_image": self.runs.overhead() / self.images,
            "stages": [
                {"live": s.live, "length": s.length, "seconds_per_iteration": t}
                for s, t in zip(real, seconds, strict=True)
            ],
            "rounds_done": len(self.runs.traces),
            "timed_per_stage": self.runs.timed(),
            "spread": self.runs.spread(),
            "tflops": done / total / 1e12,
            "extrapolation": (
                f"{self.key['iterations']} iterations at the median of {self.runs.timed()} of "
                f"each stage, plus start, selection and assembly once; batch {batch}"
            ),
        }


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Measure model by model: rounds over all contenders, then the memory of each."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    for model in dict.fromkeys(key["model"] for key in missing):
        contenders = _contenders(options, [key for key in missing if key["model"] == model], bench)
        if options.check_extrapolation:
            yield from _check(contenders, options.rounds, bench)
        else:
            yield from _race(contenders, options, bench)


def _contenders(options: Options, keys: list[Key], bench: Bench) -> list[Contender]:
    first = keys[0]
    loaded = random_model(first["model"], options.seed)
    official = None
    if options.official is not None and any(k["implementation"] != "dfq" for k in keys):
        refusal = f"The official code cannot be run with {first['model']}: "
        with explained(lambda e: SettingError(refusal + first_line(e))):
            official = Official(
                options.official,
                first["model"],
                options.seed,
                options.official_batch,
                options.device,
            )
        bench.notes.note(f"official code {code(options.official)} loaded")
    return [Contender(key, loaded, official) for key in keys]


def _race(contenders: list[Contender], options: Options, bench: Bench) -> Iterator[Measured]:
    for number in range(options.rounds):
        for contender in contenders:
            bench.notes.note(f"round {number + 1} of {options.rounds}: {contender.name}")
            contender.short()
            last = number + 1 == options.rounds and not options.memory
            yield Measured(contender.key, contender.row(), last)
    for contender in contenders if options.memory else ():
        bench.notes.note(f"memory: {contender.name}")
        yield Measured(contender.key, {**contender.row(), **_peak(contender, options)})


def _peak(contender: Contender, options: Options) -> Row:
    """Measure the peak memory of 32 images in one pass; on failure return the reason."""
    where = {"images": IMAGES, "official": str(options.official)}
    try:
        return memory.peak({**contender.key, **where})
    except RunError as error:
        return {"memory_error": str(error)}


def _check(contenders: list[Contender], rounds: int, bench: Bench) -> Iterator[Measured]:
    """Compare a full run with short runs before and after it, so that drift affects both."""
    for contender in contenders:
        bench.notes.note(f"check: {contender.name}, {contender.key['iterations']} iterations")
        for _ in range(rounds):
            contender.short()
        trace = contender.run(contender.settings)
        actual = sum(trace.iterations) + trace.tail
        for _ in range(rounds):
            contender.short()
        predicted = contender.row()["seconds_per_image"]
        row = {
            "predicted_seconds_per_image": predicted,
            "actual_seconds_per_image": actual / contender.images,
            "error": predicted * contender.images / actual - 1,
            "spread": contender.runs.spread(),
        }
        yield Measured(contender.key, row)


EXPERIMENT = Experiment(Options, plan, measure, speed_tables)
