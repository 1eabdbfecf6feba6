"""Variants of PRI and controls for the ablation of re-birth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from calibration_bench.measure.methods import patch_updates
from dfq import InversionSettings
from dfq.errors import SettingError

RERANKINGS = 12
"""Number of prunings of the control that ranks the patches repeatedly."""


@dataclass(frozen=True)
class Variant:
    """Variant of PRI; ``change``: maps the number v of stages to its settings."""

    line: str
    change: Callable[[int], dict[str, Any]]

    def settings(self, v: int, iterations: int, **shared: Any) -> InversionSettings:
        """Return the settings for ``v`` stages and a number of iterations."""
        return InversionSettings(iterations=iterations, **shared, **self.change(v))


def _pri(**changes: Any) -> Callable[[int], dict[str, Any]]:
    return lambda v: {"method": "pri", "stages": v, **changes}


def _times(power: float) -> Callable[[int], dict[str, Any]]:
    return lambda v: _pri(leave_at=tuple((k / v) ** power for k in range(1, v)))(v)


def _reranked(v: int) -> dict[str, Any]:
    return {
        "method": "smi",
        "prune_at": tuple(k / (RERANKINGS + 1) for k in range(1, RERANKINGS + 1)),
        "prune_share": 1 - math.pow(v, -1 / RERANKINGS),
    }


VARIANTS = {
    "pri": Variant("the most important patches leave (the paper)", _pri()),
    "pri-random": Variant("random patches leave", _pri(importance="random")),
    "pri-least": Variant("the least important patches leave", _pri(leave_first="least")),
    "pri-gradient": Variant("importance: gradient of the target", _pri(importance="gradient")),
    "pri-activation": Variant("importance: norm of the token", _pri(importance="activation")),
    "pri-early": Variant("images leave early: at (k/v)^2 of T", _times(2.0)),
    "pri-late": Variant("images leave late: at (k/v)^0.5 of T", _times(0.5)),
    "smi": Variant(
        "unimportant patches are dropped early, four times", lambda _: {"method": "smi"}
    ),
    "smi-reranked": Variant("dropped at 12 even times, each newly ranked; 1/v is left", _reranked),
    "dmi": Variant("all patches to the end", lambda _: {"method": "dmi"}),
    "dmi-snapshots": Variant(
        "all patches to the end, v images saved on the way",
        lambda v: {"method": "dmi", "snapshots": v},
    ),
}


def equal_iterations(
    make: Callable[[int], InversionSettings], patches: int, budget: int, v: int
) -> int:
    """Return the number of iterations with the number of patch updates nearest to ``budget``, and
    at least one iteration in each of ``v`` stages."""
    far = 1000 * v
    guess = round(budget / patch_updates(make(far), patches) * far)
    tries = range(max(1, guess - 3), max(guess + 3, 2 * v * v) + 1)
    return min(tries, key=lambda t: _distance(make(t), patches, budget))


def _distance(settings: InversionSettings, patches: int, budget: int) -> float:
    try:
        return abs(patch_updates(settings, patches) - budget)
    except SettingError:
        return math.inf
