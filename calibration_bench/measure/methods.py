"""Inversion methods as the bench names them (``pri4``), and models to invert."""

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
    """``pri4``: method ``pri`` with 4 stages, so 4 images of each trajectory."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"dmi|smi|noise|pri[1-9]\d{0,3}", self.name):
            raise SettingError(
                f"No method is called {self.name!r}; there are dmi, smi, and pri with its number "
                "of stages, such as pri4."
            )

    @property
    def images(self) -> int:
        """Images that a trajectory yields."""
        return int(self.name[3:]) if self.name.startswith("pri") else 1

    @property
    def stages(self) -> int:
        """Stages of a trajectory with dfq's defaults."""
        return len(InversionSettings().prune_at) + 1 if self.name == "smi" else self.images

    def trajectories(self, images: int) -> int:
        """Trajectories that yield at least so many images."""
        return -(-images // self.images)

    def settings(self, **changes: Any) -> InversionSettings:
        """dfq's defaults for this method with some changed."""
        return InversionSettings(
            method=cast(Any, self.name.rstrip("0123456789")), stages=self.images, **changes
        )

    def short(self, settings: InversionSettings, each: int) -> InversionSettings:
        """The same stages with ``each`` iterations apiece, for one unit of work."""
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
    """``length`` iterations with ``live`` patches."""

    live: int
    length: int


def stages(settings: InversionSettings, patches: int) -> list[Stage]:
    """What a trajectory consists of; few iterations leave stages of SMI without any."""
    found, before, live = [], 0, patches
    for event in events(settings, patches):
        found.append(Stage(live, event.iteration - before))
        before, live = event.iteration, live - (0 if event.stays else event.count)
    return found


def patch_updates(settings: InversionSettings, patches: int) -> int:
    """Steps of Adam on single patches, over all trajectories that the images take."""
    trajectories = sum(unit.trajectories for unit in plan_units(settings, patches))
    return trajectories * sum(s.live * s.length for s in stages(settings, patches))


def random_model(spec: str, seed: int) -> LoadedModel:
    """A timm model with random weights: ``NAME``, or ``NAME@SIDE`` for another input size.

    Models without a classifier get one of 1000 classes.
    """
    return dfq.load_model(random_module(spec, seed))


def random_module(spec: str, seed: int) -> Any:
    """As :func:`random_model`, the timm module."""
    name, _, side = spec.partition("@")
    if side and not side.isdecimal():
        raise SettingError(f"Model {spec!r}: after @ comes the side of the input in pixels.")
    given: dict[str, Any] = {"img_size": int(side)} if side else {}
    if not timm.is_model(name):
        raise SettingError(f"timm has no model {name!r}; `dfq models PART` lists names.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(name, pretrained=False, num_classes=1000, **given).eval()
