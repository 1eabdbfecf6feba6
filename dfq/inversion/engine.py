"""The optimisation loop that all inversion methods share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dfq.device import carrier, thread_count
from dfq.inversion.frozen import can_pack, pack_linears
from dfq.inversion.importance import importance_of, resolve_importance
from dfq.inversion.integer import multiply_integers
from dfq.inversion.jitter import draw, mirror, move_table
from dfq.inversion.objective import Objective, make_objective, seeded
from dfq.inversion.plateau import Plateau
from dfq.inversion.priors import TotalVariation
from dfq.inversion.schedule import Event, Unit, events
from dfq.inversion.units import fold_units, units_of
from dfq.recipe import InversionSettings
from dfq.sparse import SparseImages, channel_values, input_to_pixels
from dfq.vit import Preprocessing, ViT

ALGORITHM_VERSION = 3
"""Part of every cache key; raised when the same settings come to give other images."""

ADAM_EPS = 1e-8


class Watch:
    """Looks on while a unit is optimised, and changes nothing; this one looks away."""

    def iterated(self, loss: Tensor, positions: Tensor) -> None:
        """After an iteration with patches at ``positions`` ``[B, L]``; ``loss`` is the sum
        over the unit's trajectories, without the prior."""

    def selected(self, importance: Tensor, positions: Tensor, leaving: Tensor) -> None:
        """Patches have been ranked: ``importance`` ``[B, L]`` of those at ``positions``, and
        the indices ``[B, count]`` into them that leave."""


class Engine:
    """Inverts a model into sparse images, one unit of work at a time.

    The model is frozen and held in the compute precision, its weights packed where that
    pays; pixels, gradients of the priors and Adam's moments are float32 and packed
    ``[B, L, D]`` with the live patches, so that a patch that has left costs nothing.
    """

    def __init__(
        self,
        vit: ViT,
        preprocessing: Preprocessing,
        settings: InversionSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        """``settings.precision`` and ``settings.threads`` must be resolved."""
        self.settings, self.units = settings, units_of(preprocessing)
        self.device = torch.device(device)
        self.dtype = carrier(settings.precision, self.device)
        self.vit = copy.deepcopy(vit).to(self.device).requires_grad_(False)
        if self.units is not preprocessing:
            fold_units(self.vit, preprocessing, self.units, vit.arch.grid)
        if settings.precision == "int8":
            multiply_integers(self.vit)
        self.vit.to(self.dtype)
        self.grid = vit.arch.grid
        if can_pack(self.device, self.dtype):
            pack_linears(self.vit, settings.unit_size * self.grid.patches)
        self.importance = resolve_importance(settings.importance, vit.arch)
        self.events = events(settings, self.grid.patches)
        mean = channel_values(self.units.level_mean, self.grid)
        std = channel_values(self.units.level_std, self.grid)
        self.low, self.high = (-mean / std).to(self.device), ((1 - mean) / std).to(self.device)

    def run(
        self,
        unit: Unit,
        advance: Callable[[int], None] | None = None,
        watch: Watch | None = None,
    ) -> list[SparseImages]:
        """Optimise one unit; returns its images in the order in which stages finished.

        ``advance`` is called with 1 after every iteration, ``watch`` is told what happens.
        """
        threads = thread_count(self.settings.threads or torch.get_num_threads())
        with threads, torch.inference_mode(False), torch.enable_grad():
            return self._run(unit, advance or (lambda _: None), watch or Watch())

    def _run(self, unit: Unit, advance: Callable[[int], None], watch: Watch) -> list[SparseImages]:
        seed, first = self.settings.seed, unit.first_trajectory
        generator = seeded(seed, "unit", unit.index)
        classes = self.settings.classes
        objective = make_objective(self.vit.arch, seed, first, unit.trajectories, classes)
        state = _State.start(unit.trajectories, self, generator)
        found: list[SparseImages] = []
        done = 0
        for event in self.events:
            self._stage(state, event.iteration - done, objective, generator, advance, watch)
            done = event.iteration
            leaving = self._leaving(state, event, objective, generator, watch)
            if event.kept:
                found.append(self._images(state, leaving, objective.labels, unit, len(found)))
            if not event.stays:
                state.remove(leaving)
        return [images for images in found if len(images)]

    def _stage(
        self,
        state: _State,
        iterations: int,
        objective: Objective,
        generator: torch.Generator,
        advance: Callable[[int], None],
        watch: Watch,
    ) -> None:
        prior = TotalVariation(state.positions, self.grid)
        plateau = Plateau(self.settings.plateau)
        for iteration in range(1, iterations + 1):
            loss = self._step(state, prior, objective, generator)
            watch.iterated(loss, state.positions)
            advance(1)
            if self.settings.plateau and plateau.reached(float(loss)):
                advance(iterations - iteration)
                return

    def _step(
        self,
        state: _State,
        prior: TotalVariation,
        objective: Objective,
        generator: torch.Generator,
    ) -> Tensor:
        move = draw(self.grid, self.settings.jitter, self.settings.flip, generator)
        table = move_table(self.grid, *move).to(self.device)
        patches = mirror(state.patches, self.grid) if move[2] else state.patches
        patches = patches.to(self.dtype, copy=True).requires_grad_()
        loss = objective.loss(self.vit.forward_sparse(patches, table[state.positions]))
        (gradient,) = torch.autograd.grad(loss, patches)
        gradient = mirror(gradient, self.grid) if move[2] else gradient
        total = prior.gradient(state.patches).mul_(self.settings.tv).add_(gradient)
        state.descend(total, self.settings)
        torch.clamp(state.patches, self.low, self.high, out=state.patches)
        return loss.detach()

    def _leaving(
        self,
        state: _State,
        event: Event,
        objective: Objective,
        generator: torch.Generator,
        watch: Watch,
    ) -> Tensor:
        """Indices ``[B, count]`` into the live patches, in ascending order."""
        live = state.positions.shape[1]
        if event.count == live:
            return torch.arange(live, device=self.device).expand_as(state.positions)
        importance = importance_of(
            self.importance,
            self.vit,
            state.patches.to(self.dtype),
            state.positions,
            objective,
            generator,
        )
        descending = event.kept and self.settings.leave_first == "most"
        order = importance.argsort(dim=1, descending=descending, stable=True)
        leaving = order[:, : event.count].sort(dim=1).values
        watch.selected(importance, state.positions, leaving)
        return leaving

    def _images(
        self, state: _State, leaving: Tensor, labels: Tensor, unit: Unit, stage: int
    ) -> SparseImages:
        rows = [t for t, sizes in enumerate(unit.sizes) if stage < len(sizes)]
        patches = state.patches.gather(1, leaving[..., None].expand(-1, -1, state.width))[rows]
        pixels = input_to_pixels(patches, self.units, self.grid)
        trajectory = torch.tensor(rows, dtype=torch.int64) + unit.first_trajectory
        return SparseImages(
            patches=pixels.cpu(),
            positions=state.positions.gather(1, leaving)[rows].cpu(),
            labels=labels[rows],
            stage=torch.full((len(rows),), stage),
            trajectory=trajectory,
        )


class _State:
    """The live patches of a unit with Adam's moments, all ``[B, L, D]`` float32."""

    def __init__(self, patches: Tensor, positions: Tensor) -> None:
        self.patches, self.positions = patches, positions
        self.first, self.second = torch.zeros_like(patches), torch.zeros_like(patches)
        self.step = 0

    @classmethod
    def start(cls, trajectories: int, engine: Engine, generator: torch.Generator) -> _State:
        grid, device = engine.grid, engine.device
        shape = (trajectories, grid.patches, grid.patch_values)
        noise = torch.randn(shape, generator=generator).to(device)
        positions = torch.arange(grid.patches, device=device).expand(trajectories, -1)
        return cls(torch.clamp(noise, engine.low, engine.high), positions)

    @property
    def width(self) -> int:
        return self.patches.shape[2]

    def descend(self, gradient: Tensor, settings: InversionSettings) -> None:
        """One step of Adam (arXiv 1412.6980)."""
        self.step += 1
        self.first.lerp_(gradient, 1 - settings.beta1)
        self.second.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
        rate = settings.lr / (1 - settings.beta1**self.step)
        root = self.second.sqrt().div_(math.sqrt(1 - settings.beta2**self.step)).add_(ADAM_EPS)
        self.patches.addcdiv_(self.first, root, value=-rate)

    def remove(self, leaving: Tensor) -> None:
        """Drop patches by index ``[B, count]``; the others keep their order."""
        batch, live = self.positions.shape
        stays = torch.ones(batch, live, dtype=torch.bool, device=leaving.device)
        stays.scatter_(1, leaving, False)
        rest = live - leaving.shape[1]
        self.positions = self.positions[stays].reshape(batch, rest)
        for name in ("patches", "first", "second"):
            setattr(self, name, getattr(self, name)[stays].reshape(batch, rest, self.width))
