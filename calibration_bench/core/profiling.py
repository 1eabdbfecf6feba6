"""Profile of inversion: self time of operators, grouped by purpose."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from calibration_bench.measure.methods import stages
from dfq import InversionSettings, LoadedModel
from dfq.inversion import Engine, plan_units
from dfq.sparse import Grid

GROUPS = (
    ("matmul", ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "einsum")),
    ("attention", ("scaled_dot_product", "flash_attention")),
    ("softmax", ("softmax",)),
    ("layer_norm", ("layer_norm",)),
    ("gelu", ("gelu", "sigmoid")),
    ("indexing", ("gather", "scatter", "index", "embedding", "flip", "roll", "masked")),
    ("copies and casts", ("copy_", "clone", "contiguous", "_to_copy", "cat", "stack")),
    ("allocation", ("empty", "zeros", "zero_", "fill_", "resize", "new_")),
    ("Adam", ("lerp", "addcmul", "addcdiv", "sqrt", "adam")),
    ("total variation", ("norm", "linalg_vector_norm")),
)
"""Operator groups by parts of the operator's name; the first match counts."""


class Profiled:
    """Callback that profiles the iterations of every stage after its first ``warmup``."""

    def __init__(self, lengths: Iterable[int], warmup: int) -> None:
        self.starts, self.ends, done = set[int](), set[int](), 0
        for length in lengths:
            self.starts.add(done + warmup)
            done += length
            self.ends.add(done)
        self.done, self.averages = 0, list[Any]()
        self.open: Any = None
        self._turn()

    def __call__(self, _: int = 1) -> None:
        self.done += 1
        self._turn()

    def _turn(self) -> None:
        if self.open is not None and self.done in self.ends:
            self.open.__exit__(None, None, None)
            self.averages.append(self.open.key_averages(group_by_input_shape=True))
            self.open = None
        if self.done in self.starts:
            self.open = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.open.__enter__()


def shares(loaded: LoadedModel, settings: InversionSettings, warmup: int) -> list[dict[str, float]]:
    """Return each group's share of the self time of all operators, stage by stage."""
    grid = loaded.vit.arch.grid
    parts = stages(settings, grid.patches)
    (unit,) = plan_units(settings, grid.patches)
    profiled = Profiled([stage.length for stage in parts], warmup)
    Engine(loaded.vit, loaded.preprocessing, settings).run(unit, profiled)
    return [
        _grouped(averages, grid, stage.live)
        for averages, stage in zip(profiled.averages, parts, strict=True)
    ]


def _grouped(averages: Any, grid: Grid, live: int) -> dict[str, float]:
    times: collections.Counter[str] = collections.Counter()
    for event in averages:
        times[group(event.key, event.input_shapes, grid, live)] += event.self_cpu_time_total
    total = sum(times.values())
    return {name: time / total for name, time in times.most_common()}


def group(operator: str, shapes: Any, grid: Grid, live: int) -> str:
    """Return the group of an operator by its name, of elementwise ones by their shapes."""
    name = operator.rpartition("::")[2]
    named = next((g for g, parts in GROUPS if any(part in name for part in parts)), None)
    if named is not None and named != "total variation":
        return named
    sizes = [shape for shape in shapes or [] if isinstance(shape, list) and shape]
    if any(len(s) == 4 and s[1] == grid.channels for s in sizes) or named:
        return "total variation"
    if any(s[1:] == [live, grid.patch_values] for s in sizes):
        return "Adam"
    return "elementwise in the network" if sizes else "other"
