"""Optimization loop of all inversion methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dfq.device import LARGEST_WEIGHT, compute_dtype, thread_count
from dfq.inversion.frozen import can_pack, pack_linears
from dfq.inversion.importance import importance_of, ranking_of
from dfq.inversion.integer_block import multiply_integers
from dfq.inversion.jitter import Move, draw
from dfq.inversion.losses import ImageLoss, losses_of
from dfq.inversion.objective import Objective, make_objective, seeded
from dfq.inversion.plateau import Plateau
from dfq.inversion.runners import CHUNK, DeviceRunner, EngineSetup, HostRunner, Runner
from dfq.inversion.schedule import Unit, events
from dfq.inversion.schedules import Event
from dfq.inversion.state import State
from dfq.inversion.units import fold_units, units_of
from dfq.recipe import InversionSettings
from dfq.sparse import SparseImages, channel_values, input_to_pixels
from dfq.vit import Preprocessing, ViT

ALGORITHM_VERSION = 3
"""Component of every cache key; raised when the same settings come to give other images."""


class Callback:
    """Observer of the optimization of a unit; the base class does nothing."""

    def on_iteration(self, loss: Tensor, positions: Tensor) -> None:
        """Observe an iteration with patches at ``positions`` ``[B, L]``.

        ``loss``: the objective, summed over the unit's trajectories, without losses of images.
        """

    def on_selection(self, importance: Tensor, positions: Tensor, leaving: Tensor) -> None:
        """Observe a selection of patches to remove.

        ``importance``: ``[B, L]``, of the patches at ``positions``.  ``leaving``: indices
        ``[B, count]`` of the removed patches.
        """


class Engine:
    """Inversion of a model into sparse images, one unit of work at a time.

    The model is frozen and held in the compute precision, its weights packed where that
    pays; pixels, gradients of the losses of images and Adam's moments are float32 and packed
    ``[B, L, D]`` with the live patches, so that a patch that has left costs nothing.
    """

    def __init__(
        self,
        vit: ViT,
        preprocessing: Preprocessing,
        settings: InversionSettings,
        device: torch.device | str = "cpu",
        losses: Sequence[ImageLoss] | None = None,
    ) -> None:
        """Create an engine.

        ``settings.precision`` and ``settings.threads`` must be resolved.  ``losses``: losses of
        images; by default those whose weight in the settings is not 0.
        """
        self.settings, self.units = settings, units_of(preprocessing)
        self.device = torch.device(device)
        self.dtype = compute_dtype(settings.precision, self.device)
        self.vit = copy.deepcopy(vit).to(self.device).requires_grad_(False)
        if self.units is not preprocessing:
            fold_units(self.vit, preprocessing, self.units, vit.arch.grid)
        if settings.precision in LARGEST_WEIGHT:
            multiply_integers(self.vit, settings.precision)
        self.vit.to(self.dtype)
        self.grid = vit.arch.grid
        if can_pack(self.device, self.dtype):
            pack_linears(self.vit, settings.unit_size * self.grid.patches)
        self.importance = ranking_of(settings, vit.arch)
        self.events = events(settings, self.grid.patches)
        mean = channel_values(self.units.level_mean, self.grid)
        std = channel_values(self.units.level_std, self.grid)
        self.bounds = (-mean / std).to(self.device), ((1 - mean) / std).to(self.device)
        self.losses = tuple(losses_of(settings) if losses is None else losses)
        self.setup = EngineSetup(
            vit=self.vit,
            grid=self.grid,
            settings=settings,
            dtype=self.dtype,
            bounds=self.bounds,
            losses=self.losses,
            device=self.device,
        )
        self.runner = self._make_runner()
        self._stream: torch.cuda.Stream | None = None

    def run(
        self,
        unit: Unit,
        advance: Callable[[int], None] | None = None,
        callback: Callback | None = None,
    ) -> list[SparseImages]:
        """Optimize one unit; returns its images in the order in which stages finished.

        ``advance`` is called with 1 after every iteration, ``callback`` as
        :class:`Callback` describes.
        """
        threads = thread_count(self.settings.threads or torch.get_num_threads())
        with threads, torch.inference_mode(False), torch.enable_grad(), self.own_stream():
            return self._run(unit, advance or (lambda _: None), callback or Callback())

    def _make_runner(self) -> Runner:
        if self.device.type == "cuda":
            return DeviceRunner(self.setup, graphs=True)
        return HostRunner(self.setup)

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Run a block on a CUDA stream of this engine, as graphs need; on a CPU without one."""
        if self.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

    def _run(
        self, unit: Unit, advance: Callable[[int], None], callback: Callback
    ) -> list[SparseImages]:
        seed, first = self.settings.seed, unit.first_trajectory
        generator = seeded(seed, "unit", unit.index)
        classes = self.settings.classes
        objective = make_objective(self.vit.arch, seed, first, unit.trajectories, classes)
        objective.targets = objective.targets.to(self.device)
        state = self._start(unit.trajectories, generator)
        images: list[SparseImages] = []
        done = 0
        for event in self.events:
            self._stage(state, event.iteration - done, objective, generator, advance, callback)
            done = event.iteration
            leaving = self._leaving(state, event, objective, generator, callback)
            if event.kept:
                images.append(self._images(state, leaving, objective.labels, unit, len(images)))
            if not event.stays:
                state.remove(leaving)
        return [batch for batch in images if len(batch)]

    def _start(self, trajectories: int, generator: torch.Generator) -> State:
        shape = (trajectories, self.grid.patches, self.grid.patch_values)
        noise = torch.randn(shape, generator=generator).to(self.device)
        positions = torch.arange(self.grid.patches, device=self.device).repeat(trajectories, 1)
        return State(torch.clamp(noise, *self.bounds), positions)

    def _stage(
        self,
        state: State,
        iterations: int,
        objective: Objective,
        generator: torch.Generator,
        advance: Callable[[int], None],
        callback: Callback,
    ) -> None:
        plateau, chunk = Plateau(self.settings.plateau), self.settings.plateau or CHUNK
        observed = type(callback) is not Callback

        def after(loss: Tensor) -> None:
            if observed:
                callback.on_iteration(loss.clone(), state.positions)
            advance(1)

        if iterations:
            self.runner.begin(state, objective)
        for done in range(0, iterations, chunk):
            moves = self._draw(min(chunk, iterations - done), generator)
            losses = self.runner.run(moves, after)
            if self.settings.plateau and any(map(plateau.reached, losses.tolist())):
                advance(iterations - done - len(moves))
                break
        if iterations:
            self.runner.end()

    def _draw(self, count: int, generator: torch.Generator) -> list[Move]:
        settings = self.settings
        return [draw(self.grid, settings.jitter, settings.flip, generator) for _ in range(count)]

    def _leaving(
        self,
        state: State,
        event: Event,
        objective: Objective,
        generator: torch.Generator,
        callback: Callback,
    ) -> Tensor:
        """Return the indices ``[B, count]`` of the patches to remove, in ascending order."""
        live = state.positions.shape[1]
        if event.count == live:
            return torch.arange(live, device=self.device).expand_as(state.positions)
        assert self.importance is not None, "events() refuses such a schedule"
        importance = importance_of(
            self.importance,
            self.vit,
            state.patches.to(self.dtype),
            state.positions,
            objective,
            generator,
        )
        order = importance.argsort(dim=1, descending=event.leave_first == "most", stable=True)
        leaving = order[:, : event.count].sort(dim=1).values
        callback.on_selection(importance, state.positions, leaving)
        return leaving

    def _images(
        self, state: State, leaving: Tensor, labels: Tensor, unit: Unit, stage: int
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
