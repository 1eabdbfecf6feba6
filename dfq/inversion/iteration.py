"""One iteration: the gradient of the objective, and the update of the patches."""

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
    """Values of one iteration.

    ``table``: position of each patch after the jitter, int64 ``[N]``.  ``mirrored``: whether the
    jitter mirrors.  ``rate``: Adam's step size over its first bias correction; ``spread``: the
    root of the second.  If all are tensors, the host does not wait for the device.
    """

    table: Tensor
    mirrored: bool | Tensor
    rate: float | Tensor
    spread: float | Tensor


def corrections(settings: InversionSettings, step: int) -> tuple[float, float]:
    """Return Adam's ``rate`` and ``spread`` at a step, counted from 1 (arXiv 1412.6980)."""
    rate = settings.lr / (1 - settings.beta1**step)
    return rate, math.sqrt(1 - settings.beta2**step)


def make_step(settings: InversionSettings, grid: Grid, move: Move, step: int) -> Step:
    """Return a step, counted from 1, with values on the host."""
    return Step(move_table(grid, *move), move[2], *corrections(settings, step))


@dataclass(frozen=True)
class StepBuffer:
    """Buffers of the next steps on a device, and the index of the next one.

    ``tables`` int64 ``[n, N]``, ``mirrored`` bool ``[n]``, ``corrections`` float32 ``[n, 2]``,
    ``at`` int64 ``[1]``.
    """

    tables: Tensor
    mirrored: Tensor
    corrections: Tensor
    at: Tensor

    @classmethod
    def empty(cls, length: int, patches: int, device: torch.device) -> StepBuffer:
        """Create buffers of ``length`` steps."""
        return cls(
            torch.zeros(length, patches, dtype=torch.int64, device=device),
            torch.zeros(length, dtype=torch.bool, device=device),
            torch.ones(length, 2, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def fill(self, settings: InversionSettings, grid: Grid, moves: list[Move], done: int) -> None:
        """Write the steps of ``moves``, which follow the first ``done`` steps."""
        count = len(moves)
        tables = torch.stack([move_table(grid, *move) for move in moves])
        factors = [corrections(settings, done + i) for i in range(1, count + 1)]
        self.tables[:count].copy_(tables)
        self.mirrored[:count].copy_(torch.tensor([move[2] for move in moves]))
        self.corrections[:count].copy_(torch.tensor(factors))
        self.at.zero_()

    def step(self) -> Step:
        """Return the next step, with values on the device."""
        rate, spread = self.corrections.index_select(0, self.at)[0].unbind()
        table = self.tables.index_select(0, self.at)[0]
        return Step(table, self.mirrored.index_select(0, self.at), rate, spread)


class Update(Protocol):
    """Jitter, losses of images and optimizer step of an iteration."""

    def positions_changed(self) -> None:
        """Recompute what depends on the positions of the state's patches."""

    def model_input(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the jittered input: patches ``[B, L, D]``, positions ``[B, L]``."""

    def descend(self, gradient: Tensor) -> None:
        """Update the state's patches, given the gradient for :meth:`model_input`."""


class EagerUpdate:
    """Update by PyTorch's operations, for steps on the host or on the device."""

    step: Step

    def __init__(
        self,
        state: State,
        grid: Grid,
        settings: InversionSettings,
        bounds: tuple[Tensor, Tensor],
        losses: Sequence[ImageLoss],
    ) -> None:
        """Create the update; ``bounds`` are the least and the largest input, ``[D]`` each."""
        self.state, self.grid, self.settings, self.bounds = state, grid, settings, bounds
        self.bound_losses = [(each.weight, each.bind(state.positions, grid)) for each in losses]

    def positions_changed(self) -> None:
        for _, loss in self.bound_losses:
            loss.set_positions(self.state.positions)

    def model_input(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        patches = self._mirrored(self.state.patches).to(dtype, copy=True)
        positions = self.state.positions
        return patches, self.step.table.to(positions.device)[positions]

    def descend(self, gradient: Tensor) -> None:
        state, settings = self.state, self.settings
        total = self._mirrored(gradient).to(state.patches.dtype)
        for weight, loss in self.bound_losses:
            total = loss.gradient(state.patches).mul_(weight).add_(total)
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


class BufferedUpdate(EagerUpdate):
    """Update by PyTorch's operations, with steps from a :class:`StepBuffer`."""

    def __init__(
        self,
        state: State,
        grid: Grid,
        settings: InversionSettings,
        bounds: tuple[Tensor, Tensor],
        losses: Sequence[ImageLoss],
        step_buffer: StepBuffer,
    ) -> None:
        super().__init__(state, grid, settings, bounds, losses)
        self.step_buffer = step_buffer

    def model_input(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        self.step = self.step_buffer.step()
        return super().model_input(dtype)


def fused_weight(losses: Sequence[ImageLoss]) -> float | None:
    """Return the weight of total variation for :class:`TritonUpdate`.

    It is 0 without losses, and None with losses that the kernels do not compute.
    """
    if not losses:
        return 0.0
    return losses[0].weight if len(losses) == 1 and type(losses[0]) is TotalVariation else None


class TritonUpdate:
    """Update by two Triton kernels (:mod:`dfq.inversion.kernels`), for total variation alone.

    It equals :class:`EagerUpdate` but for the order of sums.
    """

    def __init__(
        self,
        state: State,
        grid: Grid,
        settings: InversionSettings,
        bounds: tuple[Tensor, Tensor],
        losses: Sequence[ImageLoss],
        step_buffer: StepBuffer,
    ) -> None:
        from dfq.inversion import kernels

        weight = fused_weight(losses)
        if weight is None:
            raise ValueError(f"no kernel computes the losses {[each.name for each in losses]}")
        self.tv = weight
        self.kernels, self.state, self.grid, self.settings = kernels, state, grid, settings
        self.bounds, self.step_buffer = bounds, step_buffer
        batch, live = state.positions.shape
        device = state.patches.device
        self.slots = torch.empty(batch, grid.patches, dtype=torch.int32, device=device)
        self.squares = torch.empty(batch, live, 4, device=device)
        self.snapshot = torch.empty_like(state.patches)

    def positions_changed(self) -> None:
        batch, live = self.state.positions.shape
        index = torch.arange(live, dtype=torch.int32, device=self.slots.device)
        self.slots.fill_(-1).scatter_(1, self.state.positions, index.expand(batch, -1))

    def model_input(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        state, step_buffer = self.state, self.step_buffer
        inputs = torch.empty_like(state.patches, dtype=dtype)
        positions = torch.empty_like(state.positions)
        self.kernels.enter(
            self.grid,
            *(state.patches, state.positions, self.slots),
            *(step_buffer.tables, step_buffer.mirrored, step_buffer.at),
            *(self.snapshot, inputs, positions, self.squares),
        )
        return inputs, positions

    def descend(self, gradient: Tensor) -> None:
        state, step_buffer, settings = self.state, self.step_buffer, self.settings
        self.kernels.descend(
            self.grid,
            *(self.snapshot, state.positions, self.slots),
            *(step_buffer.mirrored, step_buffer.corrections, step_buffer.at),
            *(self.squares, gradient.contiguous(), *self.bounds),
            *(state.patches, state.first, state.second),
            tv=self.tv,
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=ADAM_EPS,
        )


def iterate(vit: ViT, objective: Objective, update: Update, dtype: torch.dtype) -> Tensor:
    """Run one iteration; returns the objective before it, summed over trajectories."""
    patches, positions = update.model_input(dtype)
    patches.requires_grad_()
    loss = objective.loss(vit.forward_sparse(patches, positions))
    (gradient,) = torch.autograd.grad(loss, patches)
    update.descend(gradient)
    return loss.detach()
