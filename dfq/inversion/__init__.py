"""Inversion of a ViT into sparse images: PRI, SMI, DMI and other methods on one engine.

Importing it loads nothing: recipes take the fields of methods and losses from here, and are read
without PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfq.inversion.engine import ALGORITHM_VERSION, Callback, Engine
    from dfq.inversion.importance import importance_of, ranking_of, resolve_importance
    from dfq.inversion.objective import make_objective, objective_of, seeded
    from dfq.inversion.schedule import Unit, events, plan_units
    from dfq.inversion.schedules import Event

_MODULES = {
    "ALGORITHM_VERSION": "engine",
    "Callback": "engine",
    "Engine": "engine",
    "Event": "schedules",
    "Unit": "schedule",
    "events": "schedule",
    "importance_of": "importance",
    "make_objective": "objective",
    "objective_of": "objective",
    "plan_units": "schedule",
    "ranking_of": "importance",
    "resolve_importance": "importance",
    "seeded": "objective",
}

__all__ = [
    "ALGORITHM_VERSION",
    "Callback",
    "Engine",
    "Event",
    "Unit",
    "events",
    "importance_of",
    "make_objective",
    "objective_of",
    "plan_units",
    "ranking_of",
    "resolve_importance",
    "seeded",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
