"""Inversion methods by name (``pri4``), and models with random weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch

import dfq
from dfq import InversionSettings, LoadedModel
from dfq.errors import SettingError
from dfq.inversion import events, plan_units


@dataclass(frozen=True)
class Method:
    """Inversion method by name; ``pri4`` is ``pri`` with 4 stages, so 4 images per trajectory."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"dmi|smi|noise|pri[1-9]\d{0,3}", self.name):
            raise SettingError(
                f"Unknown method {self.name!r}; known: dmi, smi, noise, and pri with its number of "
                "stages, such as pri4."
            )

    @property
    def images(self) -> int:
        """Number of images per trajectory."""
        return int(self.name[3:]) if self.name.startswith("pri") else 1

    @property
    def stages(self) -> int:
        """Number of stages of a trajectory with dfq's defaults."""
        return len(InversionSettings().prune_at) + 1 if self.name == "smi" else self.images

    def trajectories(self, images: int) -> int:
        """Return the number of trajectories for at least ``images`` images."""
        return -(-images // self.images)

    def settings(self, **changes: Any) -> InversionSettings:
        """Return dfq's default settings for this method, with changes."""
        return InversionSettings(
            method=cast(Any, self.name.rstrip("0123456789")), stages=self.images, **changes
        )

    def short(self, settings: InversionSettings, each: int) -> InversionSettings:
        """Return settings of one unit of work with ``each`` iterations per stage."""
        count = self.stages
        return self.settings(
            iterations=each * count,
            prune_at=tuple(k / count for k in range(1, count)),
            unit_size=settings.unit_size,
            images=settings.unit_size * self.images,
            precision=settings.precision,
            threads=settings.threads,
            seed=settings.seed,
        )


@dataclass(frozen=True)
class Stage:
    """Stage of ``length`` iterations with ``live`` patches."""

    live: int
    length: int


def stages(settings: InversionSettings, patches: int) -> list[Stage]:
    """Return the stages of a trajectory; with few iterations some stages of SMI have none."""
    parts, before, live = [], 0, patches
    for event in events(settings, patches):
        parts.append(Stage(live, event.iteration - before))
        before, live = event.iteration, live - (0 if event.stays else event.count)
    return parts


def patch_updates(settings: InversionSettings, patches: int) -> int:
    """Count the Adam updates of single patches, over all trajectories."""
    trajectories = sum(unit.trajectories for unit in plan_units(settings, patches))
    return trajectories * sum(s.live * s.length for s in stages(settings, patches))


def random_model(spec: str, seed: int) -> LoadedModel:
    """Load a timm model with random weights; ``NAME@SIDE`` sets the image size.

    The model has 1000 classes.
    """
    return dfq.load_model(random_module(spec, seed))


def random_module(spec: str, seed: int) -> Any:
    """Create the timm module of :func:`random_model`."""
    name, _, side = spec.partition("@")
    if side and not side.isdecimal():
        raise SettingError(
            f"Model {spec!r}: give the side of the image in pixels after @, such as NAME@224."
        )
    given: dict[str, Any] = {"img_size": int(side)} if side else {}
    if not timm.is_model(name):
        raise SettingError(f"timm has no model {name!r}; `dfq models PART` lists names.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained=False, num_classes=1000, **given).eval()
