"""Runners of iterations beside the one that defines them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import make_vit
from torch import Tensor

from dfq.inversion import Callback, Engine, plan_units
from dfq.inversion.iteration import (
    BufferedUpdate,
    EagerUpdate,
    StepBuffer,
    TritonUpdate,
    Update,
    make_step,
)
from dfq.inversion.jitter import Move
from dfq.inversion.losses.total_variation import BoundTotalVariation, TotalVariation
from dfq.inversion.runners import DeviceRunner
from dfq.inversion.state import State
from dfq.recipe import InversionSettings
from dfq.sparse import Grid, SparseImages
from dfq.vit.load import LoadedModel, load_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where there is no GPU, conftest.py has Triton's kernels interpreted."""

TV = (TotalVariation(),)
MOVES: list[Move] = [(1, -1, True), (-1, 0, False)]


def chosen(**changes: Any) -> InversionSettings:
    base = InversionSettings(
        iterations=8, images=8, precision="float32", threads=1, unit_size=2, jitter=0.5
    )
    return dataclasses.replace(base, **changes)


def make_state(grid: Grid, live: int, seed: int = 0) -> State:
    g = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(grid.patches, generator=g)[:live] for _ in range(2)])
    patches = torch.randn(2, live, grid.patch_values, generator=g)
    state = State(patches.to(DEVICE), positions.sort(dim=1).values.to(DEVICE))
    state.first.copy_(torch.randn(patches.shape, generator=g))
    state.second.copy_(torch.rand(patches.shape, generator=g))
    return state


def make_step_buffer(settings: InversionSettings, grid: Grid) -> StepBuffer:
    step_buffer = StepBuffer.empty(5, grid.patches, DEVICE)
    step_buffer.fill(settings, grid, MOVES, 6)
    return step_buffer


def updated(
    update: Update, state: State, gradients: list[Tensor], step_buffer: StepBuffer | None = None
) -> list[Tensor]:
    """What three iterations with given gradients leave, and what the model was given."""
    settings = chosen()
    update.positions_changed()
    given: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        if step_buffer is None:
            assert isinstance(update, EagerUpdate)
            update.step = make_step(settings, update.grid, MOVES[index], 7 + index)
        given.extend(x.float() for x in update.model_input(torch.float32))
        update.descend(gradient)
        if step_buffer is not None:
            step_buffer.at.add_(1)
    return [*given, state.patches, state.first, state.second]


SHAPES = [
    (Grid((8, 12), (4, 4), 3), 6),
    (Grid((8, 12), (4, 4), 3), 4),
    (Grid((9, 9), (4, 3), 2), 5),
    (Grid((2, 3), (1, 1), 1), 5),
]
GRID = SHAPES[0][0]


@pytest.mark.parametrize("kind", [BufferedUpdate, TritonUpdate])
@pytest.mark.parametrize(("grid", "live"), SHAPES)
def test_updates_are_the_plain_one(kind: type[Any], grid: Grid, live: int) -> None:
    if kind is TritonUpdate:
        pytest.importorskip("triton")
    settings = chosen()
    low = -torch.rand(grid.patch_values, device=DEVICE) - 0.5
    bounds = low, torch.rand(grid.patch_values, device=DEVICE) + 0.5
    g = torch.Generator().manual_seed(3)
    shape = (2, live, grid.patch_values)
    gradients = [torch.randn(shape, generator=g).to(DEVICE) * 1e-2 for _ in MOVES]
    plain, state = make_state(grid, live), make_state(grid, live)
    expected = updated(EagerUpdate(plain, grid, settings, bounds, TV), plain, gradients)
    step_buffer = make_step_buffer(settings, grid)
    actual = updated(
        kind(state, grid, settings, bounds, TV, step_buffer), state, gradients, step_buffer
    )
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)
    assert not torch.equal(state.patches, make_state(grid, live).patches)


def test_a_place_takes_other_positions() -> None:
    grid, settings = GRID, chosen()
    bounds = torch.full((48,), -9.0, device=DEVICE), torch.full((48,), 9.0, device=DEVICE)
    state = make_state(grid, 4, seed=0)
    step_buffer = make_step_buffer(settings, grid)
    update = BufferedUpdate(state, grid, settings, bounds, TV, step_buffer)
    bound = update.bound_losses[0][1]
    assert isinstance(bound, BoundTotalVariation)
    tensors = [pairs.data_ptr() for pairs in bound.pairs]
    state.copy_(make_state(grid, 4, seed=1))
    other = make_state(grid, 4, seed=1)
    gradients = [torch.zeros_like(state.patches) for _ in MOVES]
    actual = updated(update, state, gradients, step_buffer)
    expected = updated(EagerUpdate(other, grid, settings, bounds, TV), other, gradients)
    torch.testing.assert_close(actual, expected)
    assert tensors == [pairs.data_ptr() for pairs in bound.pairs]


def test_corrections_are_those_of_torch_optim() -> None:
    settings = chosen(lr=0.1)
    state = make_state(GRID, 4)
    state.first.zero_()
    state.second.zero_()
    start, gradient = state.patches.clone(), torch.randn_like(state.patches)
    leaf = start.clone().requires_grad_()
    betas = settings.beta1, settings.beta2
    optimizer = torch.optim.Adam([leaf], lr=0.1, betas=betas, eps=1e-8)
    no_tv = dataclasses.replace(settings, tv=0.0)
    bounds = torch.full((48,), -99.0, device=DEVICE), torch.full((48,), 99.0, device=DEVICE)
    update = EagerUpdate(state, GRID, no_tv, bounds, ())
    for step in (1, 2, 3):
        leaf.grad = gradient * step
        optimizer.step()
        update.step = make_step(no_tv, GRID, (0, 0, False), step)
        update.descend(gradient * step)
    torch.testing.assert_close(state.patches, leaf.detach())


def on_device(loaded: LoadedModel, settings: InversionSettings, *, fused: bool) -> Engine:
    """An engine whose iterations read their steps from tables."""
    engine = Engine(loaded.vit, loaded.preprocessing, settings, DEVICE)
    engine.runner = DeviceRunner(engine.setup, graphs=False, fused=fused)
    return engine


def images(engine: Engine, callback: Callback | None = None) -> list[SparseImages]:
    units = plan_units(engine.settings, engine.grid.patches)
    return [batch for unit in units for batch in engine.run(unit, callback=callback)]


def assert_alike(actual: list[SparseImages], expected: list[SparseImages]) -> None:
    """The same patches, of pixels that differ by rounding alone."""
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x.positions, y.positions)
        assert torch.equal(x.labels, y.labels)
        assert int((x.patches.int() - y.patches.int()).abs().max()) <= 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "dmi", "snapshots": 2},
        {"method": "smi", "importance": "random"},
        {"plateau": 2, "iterations": 40, "stages": 2, "importance": "random"},
        {"images": 5, "stages": 2},
    ],
    ids=str,
)
def test_images_from_tables_are_those_from_the_host(
    loaded: LoadedModel, changes: dict[str, Any]
) -> None:
    settings = chosen(**changes)
    host = Engine(loaded.vit, loaded.preprocessing, settings, "cpu")
    assert_alike(images(on_device(loaded, settings, fused=False)), images(host))


@pytest.mark.parametrize("classes", [0, 1])
def test_targets_of_every_objective_follow_the_unit(classes: int) -> None:
    model = load_model(make_vit(num_classes=classes))
    settings = chosen(iterations=4, stages=2)
    host = Engine(model.vit, model.preprocessing, settings, "cpu")
    assert_alike(images(on_device(model, settings, fused=False)), images(host))


def test_images_by_kernels_are_those_from_the_host(loaded: LoadedModel) -> None:
    pytest.importorskip("triton")
    settings = chosen(iterations=2, stages=2, images=2)
    engine = on_device(loaded, settings, fused=True)
    host = Engine(loaded.vit, loaded.preprocessing, settings, "cpu")
    assert_alike(images(engine), images(host))
    assert isinstance(engine.runner, DeviceRunner)
    assert engine.runner.fallbacks == []


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_iteration(self, loss: Tensor, positions: Tensor) -> None:
        assert positions.shape[1] in (4, 8, 12, 16)
        self.losses.append(loss)


def test_a_callback_may_keep_the_losses(loaded: LoadedModel) -> None:
    here, there = Losses(), Losses()
    images(on_device(loaded, chosen(), fused=False), here)
    images(Engine(loaded.vit, loaded.preprocessing, chosen(), "cpu"), there)
    assert len(here.losses) == 8
    torch.testing.assert_close(torch.stack(here.losses).cpu(), torch.stack(there.losses))


def test_kernels_that_fail_are_given_up_and_said(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    settings = chosen(iterations=4, stages=2, images=4)
    engine = on_device(loaded, settings, fused=True)
    monkeypatch.setattr("dfq.inversion.kernels.descend", fail)
    host = Engine(loaded.vit, loaded.preprocessing, settings, "cpu")
    assert_alike(images(engine), images(host))
    assert isinstance(engine.runner, DeviceRunner)
    assert engine.runner.fallbacks == ["Triton: RuntimeError: no such instruction"]
