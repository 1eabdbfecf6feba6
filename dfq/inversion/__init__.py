"""Inversion of a ViT into sparse images: PRI, SMI and DMI on one engine."""

from dfq.inversion.engine import ALGORITHM_VERSION, Engine, Watch
from dfq.inversion.importance import importance_of, resolve_importance
from dfq.inversion.objective import make_objective, objective_of, seeded
from dfq.inversion.schedule import Event, Unit, events, plan_units

__all__ = [
    "ALGORITHM_VERSION",
    "Engine",
    "Event",
    "Unit",
    "Watch",
    "events",
    "importance_of",
    "make_objective",
    "objective_of",
    "plan_units",
    "resolve_importance",
    "seeded",
]
