"""Who starts the iterations of a stage: the host one by one, or a GPU that replays a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dfq.device import has_triton
from dfq.inversion.iteration import Course, Fused, OnDevice, Plain, Update, iterate, make_step
from dfq.inversion.jitter import Move
from dfq.inversion.objective import Objective
from dfq.inversion.state import State
from dfq.recipe import InversionSettings
from dfq.sparse import Grid
from dfq.vit import ViT

CHUNK = 256
"""Moves drawn and brought to the device at once."""

EAGER = 2
"""Iterations of a shape before it is captured: libraries set themselves up in the first."""

WORTH = 4
"""A graph is captured if it is replayed at least so often now; capturing takes about as long as
two iterations."""


@dataclass(frozen=True)
class Problem:
    """What all units of a run share; ``bounds`` are the least and the largest input ``[D]``."""

    vit: ViT
    grid: Grid
    settings: InversionSettings
    dtype: torch.dtype
    bounds: tuple[Tensor, Tensor]
    device: torch.device


class Runner(Protocol):
    """Runs the iterations of one stage after another."""

    def begin(self, state: State, objective: Objective) -> None:
        """A stage of a unit; ``state`` is changed by it and may be read at its end."""

    def run(self, moves: list[Move], after: Callable[[Tensor], None]) -> Tensor:
        """An iteration for each move; returns their losses, float32 ``[n]``.

        ``after`` is called with each loss, valid until the next iteration.
        """

    def end(self) -> None:
        """The stage is over."""


class HostRunner:
    """Every operation is started by the host.  This defines what the others compute."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def begin(self, state: State, objective: Objective) -> None:
        at = self.problem
        self.state, self.objective = state, objective
        self.update = Plain(state, at.grid, at.settings, at.bounds)

    def run(self, moves: list[Move], after: Callable[[Tensor], None]) -> Tensor:
        at, losses = self.problem, []
        for move in moves:
            self.state.step += 1
            self.update.step = make_step(at.settings, at.grid, move, self.state.step)
            losses.append(iterate(at.vit, self.objective, self.update, at.dtype))
            after(losses[-1])
        return torch.stack(losses)

    def end(self) -> None:
        pass


class DeviceRunner:
    """Iterations read all that differs between them from the device, so that one captured
    graph is all of them, of every unit of that shape.

    ``fallbacks`` says what was not possible, and why.
    """

    def __init__(self, problem: Problem, *, graphs: bool, fused: bool | None = None) -> None:
        """``fused``: update in Triton's kernels; by default where it has them."""
        self.problem, self.graphs = problem, graphs
        self.fused = has_triton(problem.device) if fused is None else fused
        self.fallbacks: list[str] = []
        self._places: dict[tuple[int, int], _Place] = {}
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    def begin(self, state: State, objective: Objective) -> None:
        batch, live = state.positions.shape
        if (batch, live) not in self._places:
            self._places[batch, live] = self._make_place(state, objective)
        self._state, self._here = state, self._places[batch, live]
        self._here.state.copy_(state)
        self._here.objective.targets.copy_(objective.targets)
        self._here.update.place()

    def run(self, moves: list[Move], after: Callable[[Tensor], None]) -> Tensor:
        here, problem = self._here, self.problem
        here.course.fill(problem.settings, problem.grid, moves, here.state.step)
        for index in range(len(moves)):
            self._iterate(here, len(moves) - index)
            here.state.step += 1
            after(here.losses[index])
        return here.losses[: len(moves)].clone()

    def end(self) -> None:
        self._state.copy_(self._here.state)

    def _make_place(self, state: State, objective: Objective) -> _Place:
        at = self.problem
        own = State(state.patches.clone(), state.positions.clone())
        length = max(CHUNK, at.settings.plateau)
        course = Course.empty(length, at.grid.patches, at.device)
        targeted = copy.copy(objective)
        targeted.targets = objective.targets.to(at.device, copy=True)
        losses = torch.zeros(length, device=at.device)
        return _Place(own, targeted, course, self._make_update(own, course), losses)

    def _make_update(self, state: State, course: Course) -> Update:
        at, kind = self.problem, Fused if self.fused else OnDevice
        return kind(state, at.grid, at.settings, at.bounds, course)

    def _iterate(self, here: _Place, left: int) -> None:
        if here.graph is None and self.graphs and here.done >= EAGER and left >= WORTH:
            self._capture(here)
        if here.graph is not None:
            here.graph.replay()
        else:
            self._eager(here)
            here.done += 1

    def _eager(self, here: _Place) -> None:
        """Start an iteration from the host; the first finds out whether Triton works here."""
        if here.done or not self.fused:
            self._record(here)
            return
        try:
            self._record(here)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's compiler has no list of what it raises
            self._fall_back("Triton", error)
            self.fused = False
            here.update = self._make_update(here.state, here.course)
            here.update.place()
            self._record(here)

    def _record(self, here: _Place) -> None:
        at = self.problem
        loss = iterate(at.vit, here.objective, here.update, at.dtype)
        here.losses.index_copy_(0, here.course.at, loss[None])
        here.course.at.add_(1)

    def _capture(self, here: _Place) -> None:
        """Capture an iteration, which runs none; on failure all go on from the host."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.problem.device)
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
            ):
                self._record(here)
        except Exception as error:  # nor has what cannot be captured
            self._fall_back("CUDA graphs", error)
            self.graphs = False
        else:
            here.graph = graph

    def _fall_back(self, what: str, error: Exception) -> None:
        self.fallbacks.append(f"{what}: {type(error).__name__}: {error}")


@dataclass
class _Place:
    """The tensors of all units of one shape, which stay where they are, and their graph."""

    state: State
    objective: Objective
    course: Course
    update: Update
    losses: Tensor
    done: int = 0
    graph: torch.cuda.CUDAGraph | None = field(default=None, repr=False)
