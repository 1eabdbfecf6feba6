"""One iteration: the model's gradient, and the small work before and after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dfq.inversion.jitter import Move, mirror, move_table
from dfq.inversion.losses import ImageLoss
from dfq.inversion.losses.total_variation import TotalVariation
from dfq.inversion.objective import Objective
from dfq.inversion.state import State
from dfq.recipe import InversionSettings
from dfq.sparse import Grid
from dfq.vit import ViT

ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Step:
    """What an iteration does not share with the others.

    ``table`` int64 ``[N]`` is where the jitter takes each position, ``mirrored`` whether it
    mirrors, ``rate`` and ``spread`` are Adam's step size over its first correction and the
    root of its second.  Where all are tensors, nothing waits for their values.
    """

    table: Tensor
    mirrored: bool | Tensor
    rate: float | Tensor
    spread: float | Tensor


def corrections(settings: InversionSettings, step: int) -> tuple[float, float]:
    """Adam's ``rate`` and ``spread`` at a step, counted from 1 (arXiv 1412.6980)."""
    rate = settings.lr / (1 - settings.beta1**step)
    return rate, math.sqrt(1 - settings.beta2**step)


def make_step(settings: InversionSettings, grid: Grid, move: Move, step: int) -> Step:
    """The step of that number with values that the host knows."""
    return Step(move_table(grid, *move), move[2], *corrections(settings, step))


@dataclass(frozen=True)
class Course:
    """The next steps as tables on a device, and which of them comes next.

    ``tables`` int64 ``[n, N]``, ``mirrored`` bool ``[n]``, ``corrections`` float32 ``[n, 2]``,
    ``at`` int64 ``[1]``.
    """

    tables: Tensor
    mirrored: Tensor
    corrections: Tensor
    at: Tensor

    @classmethod
    def empty(cls, length: int, patches: int, device: torch.device) -> Course:
        """Room for so many steps."""
        return cls(
            torch.zeros(length, patches, dtype=torch.int64, device=device),
            torch.zeros(length, dtype=torch.bool, device=device),
            torch.ones(length, 2, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def fill(self, settings: InversionSettings, grid: Grid, moves: list[Move], done: int) -> None:
        """Take over these moves, of steps after the ``done`` that are over."""
        count = len(moves)
        tables = torch.stack([move_table(grid, *move) for move in moves])
        factors = [corrections(settings, done + i) for i in range(1, count + 1)]
        self.tables[:count].copy_(tables)
        self.mirrored[:count].copy_(torch.tensor([move[2] for move in moves]))
        self.corrections[:count].copy_(torch.tensor(factors))
        self.at.zero_()

    def step(self) -> Step:
        """The next step, read on the device."""
        rate, spread = self.corrections.index_select(0, self.at)[0].unbind()
        table = self.tables.index_select(0, self.at)[0]
        return Step(table, self.mirrored.index_select(0, self.at), rate, spread)


class Update(Protocol):
    """What an iteration does beside the model's forward and gradient."""

    def place(self) -> None:
        """The state's patches lie elsewhere than before."""

    def enter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the model is given: patches ``[B, L, D]``, positions ``[B, L]``."""

    def descend(self, gradient: Tensor) -> None:
        """Move the state's patches against the gradient of what :meth:`enter` gave."""


class Plain:
    """The update in PyTorch's operations, for steps of either kind."""

    step: Step

    def __init__(
        self,
        state: State,
        grid: Grid,
        settings: InversionSettings,
        bounds: tuple[Tensor, Tensor],
        losses: Sequence[ImageLoss],
    ) -> None:
        """``bounds`` are the smallest and the largest input, ``[D]`` each."""
        self.state, self.grid, self.settings, self.bounds = state, grid, settings, bounds
        self.terms = [(each.weight, each.bind(state.positions, grid)) for each in losses]

    def place(self) -> None:
        for _, term in self.terms:
            term.place(self.state.positions)

    def enter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        patches = self._mirrored(self.state.patches).to(dtype, copy=True)
        positions = self.state.positions
        return patches, self.step.table.to(positions.device)[positions]

    def descend(self, gradient: Tensor) -> None:
        state, settings = self.state, self.settings
        total = self._mirrored(gradient).to(state.patches.dtype)
        for weight, term in self.terms:
            total = term.gradient(state.patches).mul_(weight).add_(total)
        state.first.lerp_(total, 1 - settings.beta1)
        state.second.mul_(settings.beta2).addcmul_(total, total, value=1 - settings.beta2)
        root = state.second.sqrt().div_(self.step.spread).add_(ADAM_EPS)
        if isinstance(self.step.rate, Tensor):
            state.patches.sub_(state.first.div(root).mul_(self.step.rate))
        else:
            state.patches.addcdiv_(state.first, root, value=-self.step.rate)
        torch.clamp(state.patches, *self.bounds, out=state.patches)

    def _mirrored(self, patches: Tensor) -> Tensor:
        flip = self.step.mirrored
        if isinstance(flip, Tensor):
            return torch.where(flip, mirror(patches, self.grid), patches)
        return mirror(patches, self.grid) if flip else patches


class OnDevice(Plain):
    """The same with steps from tables on the device."""

    def __init__(
        self,
        state: State,
        grid: Grid,
        settings: InversionSettings,
        bounds: tuple[Tensor, Tensor],
        losses: Sequence[ImageLoss],
        course: Course,
    ) -> None:
        super().__init__(state, grid, settings, bounds, losses)
        self.course = course

    def enter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        self.step = self.course.step()
        return super().enter(dtype)


def fused_weight(losses: Sequence[ImageLoss]) -> float | None:
    """Total variation's weight where it is the only loss, which is what the kernels of
    :class:`Fused` hold; 0 without any loss, None with others."""
    if not losses:
        return 0.0
    return losses[0].weight if len(losses) == 1 and type(losses[0]) is TotalVariation else None


class Fused:
    """The update in two Triton kernels (:mod:`dfq.inversion.kernels`); as :class:`Plain` but
    for the order of sums, and for total variation alone."""

    def __init__(
        self,
        state: State,
        grid: Grid,
        settings: InversionSettings,
        bounds: tuple[Tensor, Tensor],
        losses: Sequence[ImageLoss],
        course: Course,
    ) -> None:
        from dfq.inversion import kernels

        weight = fused_weight(losses)
        if weight is None:
            raise ValueError(f"no kernel holds the losses {[each.name for each in losses]}")
        self.tv = weight
        self.kernels, self.state, self.grid, self.settings = kernels, state, grid, settings
        self.bounds, self.course = bounds, course
        batch, live = state.positions.shape
        device = state.patches.device
        self.slots = torch.empty(batch, grid.patches, dtype=torch.int32, device=device)
        self.squares = torch.empty(batch, live, 4, device=device)
        self.snapshot = torch.empty_like(state.patches)

    def place(self) -> None:
        batch, live = self.state.positions.shape
        index = torch.arange(live, dtype=torch.int32, device=self.slots.device)
        self.slots.fill_(-1).scatter_(1, self.state.positions, index.expand(batch, -1))

    def enter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        state, course = self.state, self.course
        inputs = torch.empty_like(state.patches, dtype=dtype)
        moved = torch.empty_like(state.positions)
        self.kernels.enter(
            self.grid,
            *(state.patches, state.positions, self.slots),
            *(course.tables, course.mirrored, course.at),
            *(self.snapshot, inputs, moved, self.squares),
        )
        return inputs, moved

    def descend(self, gradient: Tensor) -> None:
        state, course, settings = self.state, self.course, self.settings
        self.kernels.descend(
            self.grid,
            *(self.snapshot, state.positions, self.slots),
            *(course.mirrored, course.corrections, course.at),
            *(self.squares, gradient.contiguous(), *self.bounds),
            *(state.patches, state.first, state.second),
            tv=self.tv,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=ADAM_EPS,
        )


def iterate(vit: ViT, objective: Objective, update: Update, dtype: torch.dtype) -> Tensor:
    """One iteration; returns the objective before it, summed over trajectories."""
    patches, positions = update.enter(dtype)
    patches.requires_grad_()
    loss = objective.loss(vit.forward_sparse(patches, positions))
    (gradient,) = torch.autograd.grad(loss, patches)
    update.descend(gradient)
    return loss.detach()
