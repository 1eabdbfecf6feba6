"""Time of iterations and of GPTQ on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.inversion import Engine, make_objective, seeded
from dfq.inversion.jitter import Move, draw
from dfq.inversion.runners import Runner
from dfq.inversion.state import State
from dfq.quantization import rounding
from dfq.quantization.scheme import Scheme
from dfq.recipe import QuantizationSettings
from dfq.runtime.graphs import capture

WARMUP = 8
"""Untimed first iterations: eager ones, the capture of a graph, and its first replays."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the median time of a function, after an untimed call."""
    work()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        before = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def start(engine: Engine, live: int, seed: int) -> State:
    """Return noise in ``live`` patches at random positions."""
    generator = seeded(seed, "gpu-check", live)
    batch, grid = engine.settings.unit_size, engine.grid
    places = [torch.randperm(grid.patches, generator=generator)[:live] for _ in range(batch)]
    noise = torch.randn(batch, live, grid.patch_values, generator=generator)
    patches = torch.clamp(noise.to(engine.device), *engine.bounds)
    return State(patches, torch.stack(places).sort(dim=1).values.to(engine.device))


def moves(engine: Engine, count: int) -> list[Move]:
    """Return ``count`` random shifts of the jitter."""
    generator, settings = seeded(0, "gpu-check moves", 0), engine.settings
    return [draw(engine.grid, settings.jitter, settings.flip, generator) for _ in range(count)]


def objective(engine: Engine) -> Any:
    """Return the objective of a unit of work, on its device."""
    target = make_objective(engine.vit.arch, 0, 0, engine.settings.unit_size)
    target.targets = target.targets.to(engine.device)
    return target


def iterations(
    engine: Engine, runner: Runner, live: int, count: int, repeats: int = 3
) -> tuple[float, Tensor]:
    """Return the median seconds of an iteration, and the patches after the warm-up."""
    state, made = start(engine, live, 0), moves(engine, count)
    with engine.own_stream(), torch.enable_grad():
        runner.begin(state, objective(engine))
        runner.run(made[:WARMUP], lambda _: None)
        runner.end()
        after = state.patches.clone()
        seconds = median_seconds(lambda: runner.run(made, lambda _: None), engine.device, repeats)
    return seconds / count, after


def gradient_seconds(engine: Engine, live: int, count: int) -> float:
    """Return the median seconds of the forward and backward pass, on a GPU as a CUDA graph."""
    state, target = start(engine, live, 0), objective(engine)

    def work() -> None:
        leaf = state.patches.to(engine.dtype).requires_grad_()
        loss = target.loss(engine.vit.forward_sparse(leaf, state.positions))
        torch.autograd.grad(loss, leaf)

    with engine.own_stream(), torch.enable_grad():
        work()
        work()
        replay = _captured(work) if engine.device.type == "cuda" else work
        return median_seconds(lambda: [replay() for _ in range(count)], engine.device) / count


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    return capture(work, stream=torch.cuda.current_stream()).replay


def launches(work: Callable[[], object], device: torch.device) -> int | None:
    """Return the number of kernels that a function launches on a GPU; None without a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    work()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    events = profiler.events() or []
    return sum(1 for e in events if e.device_type == torch.autograd.DeviceType.CUDA)


def rounding_problem(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Return a weight ``[out, in]`` and the Hessian of correlated inputs with outlier channels."""
    generator = seeded(0, "gpu-check rounding", inputs)
    mixing = torch.randn(inputs, inputs // 2, generator=generator)
    x = torch.randn(2 * inputs, inputs // 2, generator=generator) @ mixing.T
    x = (x + torch.randn(2 * inputs, inputs, generator=generator)).mul_(
        torch.randn(inputs, generator=generator).exp()
    )
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    return weight, x.T @ x / len(x)


def gptq(outputs: int, inputs: int, group: int, damping: float, device: torch.device) -> Any:
    """Compare GPTQ of one layer on a device and on the CPU, and time its parts.

    ``equal_share``: share of equal integers.  ``error_ratio``: ratio of the squared errors of the
    outputs.
    """
    scheme = Scheme(QuantizationSettings(bits=4, group=group)).for_layer("blocks.0.mlp.fc1")
    qtype = scheme.weight
    weight, hessian = rounding_problem(outputs, inputs)
    scales = rounding.search_scales(weight, scheme, hessian.diagonal())
    expected = rounding.round_gptq(weight, scales, qtype, hessian, damping)
    there = weight.to(device), hessian.to(device)
    moved = rounding.WeightScales(
        scales.channel.to(device),
        None if scales.group is None else scales.group.to(device),
        scales.size,
    )

    def whole() -> Tensor:
        return rounding.round_gptq(there[0], moved, qtype, there[1], damping)

    rounded = whole().cpu()

    def error(integers: Tensor) -> float:
        left = (weight - scales.dequantize(integers)).double()
        return float(((left @ hessian.double()) * left).sum())

    own = rounding.search_scales(there[0], scheme, there[1].diagonal())
    return {
        "equal_share": float((rounded == expected).double().mean()),
        "equal_channels": float((rounded == expected).all(1).double().mean()),
        "error_ratio": error(rounded) / error(expected),
        "equal_scales": float((own.channel.cpu() == scales.channel).double().mean()),
        "seconds": median_seconds(whole, device),
        "factor_seconds": median_seconds(
            lambda: rounding._inverse_factor(there[1], damping), device
        ),
        "search_seconds": median_seconds(
            lambda: rounding.search_scales(there[0], scheme, there[1].diagonal()),
            device,
        ),
        "launches": launches(whole, device),
        "triton_failure": rounding.triton_failure(device),
    }
