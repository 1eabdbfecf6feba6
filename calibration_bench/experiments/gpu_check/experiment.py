"""Check of a GPU in one command: iterations, inversion, GPTQ, ``dfq quantize``, logits.

Each part is a row.  A part that fails is stored with its error, and the others are still measured.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dfq
from calibration_bench.core.options import option, words
from calibration_bench.core.registry import Bench, Experiment, Key, Measured, Row
from calibration_bench.core.tables import gpu_tables
from calibration_bench.experiments.inversion_speed.experiment import Contender
from calibration_bench.measure import gpu
from calibration_bench.measure.measure import PeakMemory
from calibration_bench.measure.methods import Method, random_model, random_module, stages
from calibration_bench.measure.official import Official, code
from dfq import InversionSettings, LoadedModel, QuantizationSettings
from dfq.device import resolve_device, resolve_precision
from dfq.inversion import Engine, plan_units
from dfq.inversion.runners import DeviceRunner

PARTS = ("gptq", "iteration", "quantize", "inversion", "inference")
METHODS = ("dmi", "smi", "pri4", "pri7")
LENGTH = 4000
"""Iterations of the full run that is extrapolated to, as published."""


@dataclass(frozen=True)
class Options:
    """Options of ``run gpu-check``."""

    model: str = option("vit_base_patch16_224", "timm model with random weights.")
    official: Path | None = option(None, "Checkout of Egg-Hu/SMI; without it only dfq is measured.")
    device: str = option("cuda", "Device: cuda, cuda:1, ... or cpu.")
    tiny: bool = option(
        False, "Use a small model and few repeats, to test the experiment without a GPU."
    )
    parts: str = option(",".join(PARTS), "Which parts.")
    seed: int = option(0, "Seed of weights, noise and jitter.")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements, by part."""

    model: str
    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    iterations: int
    layers: tuple[tuple[int, int], ...]
    quantize: dict[str, Any]
    methods: tuple[str, ...] = METHODS
    inference: tuple[int, ...] = (1, 128)
    inference_seconds: float = 3.0
    compiled: bool = True


def _sizes(options: Options) -> Sizes:
    if options.tiny:
        return Sizes(
            "test_vit@64",
            ((2, 16), (2, 4)),
            (2,),
            8,
            ((24, 40),),
            {
                "images": 4,
                "iterations": 4,
                "settings": {"quantization": {"fractal": 2, "smooth": ()}},
            },
            ("pri2",),
            inference=(2,),
            inference_seconds=0.05,
            compiled=False,
        )
    shapes = ((4, 196), (4, 49), (8, 196), (8, 98), (8, 49), (32, 196), (32, 49))
    return Sizes(options.model, shapes, (8, 64), 40, ((768, 768), (768, 3072)), {})


def plan(options: Options, _: Bench) -> list[Key]:
    """Return the keys of each part."""
    device, sizes = resolve_device(options.device), _sizes(options)
    shared = {
        "model": sizes.model,
        "device": str(device),
        "precision": resolve_precision("auto", device),
        "seed": options.seed,
    }
    rows: list[Key] = [
        {"part": "gptq", "outputs": outputs, "inputs": inputs} for outputs, inputs in sizes.layers
    ]
    rows += [{"part": "iteration", "batch": b, "live": live} for b, live in sizes.shapes]
    rows += [
        {"part": "quantize", "bits": bits, "turn": turn} for bits, turn in ((4, 1), (4, 2), (8, 1))
    ]
    rows += [
        {"part": "inference", "bits": bits, "batch": batch}
        for bits in (8, 4)
        for batch in sizes.inference
    ]
    rows += [
        {"part": "inversion", "implementation": "dfq", "batch": batch, "method": method}
        for batch in sizes.batches
        for method in sizes.methods
    ]
    if options.official is not None:
        official_code = code(options.official)
        rows += [
            {
                "part": "inversion",
                "implementation": "official",
                "batch": batch,
                "method": method,
                "official_code": official_code,
            }
            for batch in sizes.batches
            for method in ("dmi", "smi")
        ]
    chosen = words(options.parts, "--parts", PARTS)
    return [{**row, **shared} for row in rows if row["part"] in chosen]


def measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    """Measure part by part; a failure becomes a row with its error."""
    sizes, device = _sizes(options), resolve_device(options.device)
    loaded = random_model(sizes.model, options.seed)
    parts: dict[str, Callable[[Key], Row]] = {
        "gptq": lambda key: _gptq(key, device),
        "iteration": lambda key: _iteration(key, loaded, sizes, device),
        "quantize": lambda key: _quantize(key, sizes, options, bench.results),
        "inversion": lambda key: _inversion(key, loaded, sizes, options, device),
        "inference": lambda key: _inference(key, sizes, options, bench.results),
    }
    for key in missing:
        bench.notes.note(", ".join(str(v) for v in key.values()))
        before, memory = time.perf_counter(), PeakMemory(device)
        try:
            row = parts[key["part"]](key)
        except Exception as error:  # whatever fails on a GPU is what the check is for
            yield Measured(key, {"error": f"{type(error).__name__}: {error}"}, complete=False)
        else:
            spent = time.perf_counter() - before
            yield Measured(key, {**row, "peak_memory_mb": memory.peak(), "measured_in": spent})


def _gptq(key: Key, device: torch.device) -> Row:
    defaults = QuantizationSettings(bits=4)
    row: Row = gpu.gptq(key["outputs"], key["inputs"], defaults.group, defaults.damping, device)
    return row


def _engine(key: Key, loaded: LoadedModel, device: torch.device) -> Engine:
    settings = InversionSettings(
        unit_size=key["batch"], precision=key["precision"], threads=torch.get_num_threads()
    )
    return Engine(loaded.vit, loaded.preprocessing, settings, device)


def _iteration(key: Key, loaded: LoadedModel, sizes: Sizes, device: torch.device) -> Row:
    """Time an iteration as a CUDA graph and eagerly, and its forward and backward pass."""
    engine, live, count = _engine(key, loaded, device), key["live"], sizes.iterations
    runner = engine.runner
    seconds, graph = gpu.iterations(engine, runner, live, count)
    host = DeviceRunner(engine.setup, graphs=False)
    eager_seconds, eager = gpu.iterations(engine, host, live, count, repeats=1)
    again = gpu.iterations(engine, host, live, gpu.WARMUP, repeats=1)[1]
    gradient = gpu.gradient_seconds(engine, live, count)
    return {
        "seconds": seconds,
        "eager_seconds": eager_seconds,
        "gradient_seconds": gradient,
        "over_gradient": seconds / gradient,
        "eager_over_graph": eager_seconds / seconds,
        "equal_to_eager": bool(torch.equal(graph, eager)),
        "eager_repeats": bool(torch.equal(eager, again)),
        "largest_difference": float((graph - eager).abs().max()),
        "fallbacks": _fallbacks(engine),
    }


def _fallbacks(engine: Engine) -> list[str]:
    return [*engine.runner.fallbacks] if isinstance(engine.runner, DeviceRunner) else []


def _inversion(
    key: Key, loaded: LoadedModel, sizes: Sizes, options: Options, device: torch.device
) -> Row:
    """Measure seconds per image, extrapolated to a whole trajectory."""
    method = Method(key["method"])
    if key["implementation"] == "official":
        return _official(key, loaded, sizes, options)
    settings = method.settings(
        iterations=LENGTH,
        unit_size=key["batch"],
        images=key["batch"] * method.images,
        precision=key["precision"],
        threads=torch.get_num_threads(),
    )
    patches = loaded.vit.arch.grid.patches
    engine = Engine(loaded.vit, loaded.preprocessing, settings, device)
    runs = [
        (stage, gpu.iterations(engine, engine.runner, stage.live, sizes.iterations, 1)[0])
        for stage in stages(settings, patches)
    ]
    short = method.short(settings, gpu.WARMUP)
    (unit,) = plan_units(short, patches)
    shorter = Engine(loaded.vit, loaded.preprocessing, short, device)
    outside = gpu.median_seconds(lambda: shorter.run(unit), device, 1) - gpu.WARMUP * sum(
        seconds for _, seconds in runs
    )
    total = max(0.0, outside) + sum(stage.length * seconds for stage, seconds in runs)
    return {
        "seconds_per_image": total / unit.images,
        "outside_seconds": outside,
        "stages": [
            {"live": s.live, "length": s.length, "seconds_per_iteration": t} for s, t in runs
        ],
        "fallbacks": _fallbacks(engine),
    }


def _official(key: Key, loaded: LoadedModel, sizes: Sizes, options: Options) -> Row:
    assert options.official is not None
    official = Official(options.official, sizes.model, options.seed, key["batch"], options.device)
    each = max(4, sizes.iterations // 8)
    given = {
        **key,
        "iterations": LENGTH,
        "threads": torch.get_num_threads(),
        "warmup": 2,
        "iterations_per_stage": each,
    }
    contender = Contender(given, loaded, official)
    contender.short()
    return contender.row()


def _quantize(key: Key, sizes: Sizes, options: Options, results: Path) -> Row:
    """Time the stages of ``dfq quantize`` with its defaults and without cached images."""
    module = random_module(sizes.model, options.seed)
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=results) as directory:
        result = dfq.quantize(
            module,
            bits=key["bits"],
            device=options.device,
            seed=options.seed,
            cache=Path(directory) / "cache",
            out=Path(directory) / "out",
            **sizes.quantize,
        )
    spent = {
        name: getattr(result.seconds, name)
        for name in ("load", "invert", "calibrate", "quantize", "evaluate", "total")
    }
    return {**spent, "without_loading": spent["total"] - spent["load"]}


INFERENCE = ("dfq", "dfq-eager", "torch-bf16")
COMPILED = ("dfq-compiled", "torch-bf16-compiled")
"""Runtimes of ``dfq benchmark`` that are measured side by side, and those that compile."""


def _inference(key: Key, sizes: Sizes, options: Options, results: Path) -> Row:
    """Images a second of a checkpoint and of its weights in bfloat16, in turns in this process."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=results) as directory:
        made = dfq.quantize(
            random_module(sizes.model, options.seed),
            bits=key["bits"],
            calibration="noise",
            images=4,
            device=options.device,
            evaluate=False,
            cache=Path(directory) / "cache",
            out=Path(directory) / "out",
        )
        found = dfq.benchmark(
            made.checkpoint,
            batch=[key["batch"]],
            seconds=sizes.inference_seconds,
            device=options.device,
            runtimes=[*INFERENCE, *(COMPILED if sizes.compiled else ())],
        )
    speeds = {row.runtime.replace("-", "_"): row.images_per_second for row in found.rows}
    return {
        **speeds,
        "over_bf16": speeds["dfq"] / speeds["torch_bf16"],
        "graphs_over_eager": speeds["dfq"] / speeds["dfq_eager"],
        "absent": [f"{each.runtime}: {each.reason}" for each in found.absent],
    }


EXPERIMENT = Experiment(Options, plan, measure, gpu_tables)
