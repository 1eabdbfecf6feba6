"""Inversion of a ViT into sparse images: PRI, SMI and DMI on one engine."""

from dfq.inversion.engine import ALGORITHM_VERSION, Engine
from dfq.inversion.importance import resolve_importance
from dfq.inversion.objective import objective_of
from dfq.inversion.schedule import Event, Unit, events, plan_units

__all__ = [
    "ALGORITHM_VERSION",
    "Engine",
    "Event",
    "Unit",
    "events",
    "objective_of",
    "plan_units",
    "resolve_importance",
]
