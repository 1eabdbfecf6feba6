"""Runners of the iterations of a stage: launched by the host, or replayed as CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dfq.device import has_triton
from dfq.inversion.iteration import (
    BufferedUpdate,
    EagerUpdate,
    StepBuffer,
    TritonUpdate,
    Update,
    fused_weight,
    iterate,
    make_step,
)
from dfq.inversion.jitter import Move
from dfq.inversion.losses import ImageLoss
from dfq.inversion.objective import Objective
from dfq.inversion.state import State
from dfq.recipe import InversionSettings
from dfq.runtime.graphs import capture
from dfq.sparse import Grid
from dfq.vit import ViT

CHUNK = 256
"""Number of moves copied to the device at once."""

WARMUP = 2
"""Eager iterations of a shape before capture, in which libraries initialize."""

MIN_REPLAYS = 4
"""Least number of remaining iterations for which a graph is captured; capturing takes about as
long as two iterations."""


@dataclass(frozen=True)
class EngineSetup:
    """Model and settings of an engine; ``bounds`` are the least and the largest input ``[D]``."""

    vit: ViT
    grid: Grid
    settings: InversionSettings
    dtype: torch.dtype
    bounds: tuple[Tensor, Tensor]
    losses: tuple[ImageLoss, ...]
    device: torch.device


class Runner(Protocol):
    """Runner of the iterations of one stage after another."""

    def begin(self, state: State, objective: Objective) -> None:
        """Begin a stage of a unit; ``state`` is up to date after :meth:`end`."""

    def run(self, moves: list[Move], after: Callable[[Tensor], None]) -> Tensor:
        """Run an iteration for each move; returns their losses, float32 ``[n]``.

        ``after`` is called with each loss, valid until the next iteration.
        """

    def end(self) -> None:
        """End the stage."""


class HostRunner:
    """Runner that launches every operation from the host; the reference for the others."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup

    def begin(self, state: State, objective: Objective) -> None:
        setup = self.setup
        self.state, self.objective = state, objective
        self.update = EagerUpdate(state, setup.grid, setup.settings, setup.bounds, setup.losses)

    def run(self, moves: list[Move], after: Callable[[Tensor], None]) -> Tensor:
        setup, losses = self.setup, []
        for move in moves:
            self.state.step += 1
            self.update.step = make_step(setup.settings, setup.grid, move, self.state.step)
            losses.append(iterate(setup.vit, self.objective, self.update, setup.dtype))
            after(losses[-1])
        return torch.stack(losses)

    def end(self) -> None:
        pass


class DeviceRunner:
    """Runner whose iterations read all that differs between them from buffers on the device.

    One captured CUDA graph thus serves all iterations of all units of a shape.  ``fallbacks``
    lists what could not be used, and why.
    """

    def __init__(self, setup: EngineSetup, *, graphs: bool, fused: bool | None = None) -> None:
        """Create a runner.

        ``graphs``: capture CUDA graphs.  ``fused``: use :class:`TritonUpdate` if its kernels
        compute all losses; by default if Triton supports the device.
        """
        self.setup, self.graphs = setup, graphs
        wanted = has_triton(setup.device) if fused is None else fused
        self.fused = wanted and fused_weight(setup.losses) is not None
        self.fallbacks: list[str] = []
        self._buffers: dict[tuple[int, int], _ShapeBuffers] = {}
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    def begin(self, state: State, objective: Objective) -> None:
        batch, live = state.positions.shape
        if (batch, live) not in self._buffers:
            self._buffers[batch, live] = self._make_buffers(state, objective)
        self._state, self._current = state, self._buffers[batch, live]
        self._current.state.copy_(state)
        self._current.objective.targets.copy_(objective.targets)
        self._current.update.positions_changed()

    def run(self, moves: list[Move], after: Callable[[Tensor], None]) -> Tensor:
        buffers, setup = self._current, self.setup
        buffers.step_buffer.fill(setup.settings, setup.grid, moves, buffers.state.step)
        for index in range(len(moves)):
            self._iterate(buffers, len(moves) - index)
            buffers.state.step += 1
            after(buffers.losses[index])
        return buffers.losses[: len(moves)].clone()

    def end(self) -> None:
        self._state.copy_(self._current.state)

    def _make_buffers(self, state: State, objective: Objective) -> _ShapeBuffers:
        setup = self.setup
        own = State(state.patches.clone(), state.positions.clone())
        length = max(CHUNK, setup.settings.plateau)
        step_buffer = StepBuffer.empty(length, setup.grid.patches, setup.device)
        targeted = copy.copy(objective)
        targeted.targets = objective.targets.to(setup.device, copy=True)
        losses = torch.zeros(length, device=setup.device)
        return _ShapeBuffers(
            own, targeted, step_buffer, self._make_update(own, step_buffer), losses
        )

    def _make_update(self, state: State, step_buffer: StepBuffer) -> Update:
        setup, kind = self.setup, TritonUpdate if self.fused else BufferedUpdate
        return kind(state, setup.grid, setup.settings, setup.bounds, setup.losses, step_buffer)

    def _iterate(self, buffers: _ShapeBuffers, left: int) -> None:
        if buffers.graph is None and self.graphs and buffers.done >= WARMUP and left >= MIN_REPLAYS:
            self._capture(buffers)
        if buffers.graph is not None:
            buffers.graph.replay()
        else:
            self._eager(buffers)
            buffers.done += 1

    def _eager(self, buffers: _ShapeBuffers) -> None:
        """Launch an iteration from the host; fall back to PyTorch if Triton fails in the first."""
        if buffers.done or not self.fused:
            self._record(buffers)
            return
        try:
            self._record(buffers)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the errors of Triton's compiler are not documented
            self._fall_back("Triton", error)
            self.fused = False
            buffers.update = self._make_update(buffers.state, buffers.step_buffer)
            buffers.update.positions_changed()
            self._record(buffers)

    def _record(self, buffers: _ShapeBuffers) -> None:
        setup = self.setup
        loss = iterate(setup.vit, buffers.objective, buffers.update, setup.dtype)
        buffers.losses.index_copy_(0, buffers.step_buffer.at, loss[None])
        buffers.step_buffer.at.add_(1)

    def _capture(self, buffers: _ShapeBuffers) -> None:
        """Capture an iteration without running it; on failure all are launched from the host."""
        stream = torch.cuda.current_stream(self.setup.device)
        try:
            buffers.graph = capture(lambda: self._record(buffers), self._pool, stream)
        except Exception as error:  # the errors of a capture are not documented
            self._fall_back("CUDA graphs", error)
            self.graphs = False

    def _fall_back(self, what: str, error: Exception) -> None:
        self.fallbacks.append(f"{what}: {type(error).__name__}: {error}")


@dataclass
class _ShapeBuffers:
    """Tensors at fixed addresses for all units of one shape, and their captured graph."""

    state: State
    objective: Objective
    step_buffer: StepBuffer
    update: Update
    losses: Tensor
    done: int = 0
    graph: torch.cuda.CUDAGraph | None = field(default=None, repr=False)
