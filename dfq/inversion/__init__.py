"""Inversion of a ViT into sparse images: PRI, SMI and DMI on one engine."""

from dfq.inversion.engine import ALGORITHM_VERSION, Engine
from dfq.inversion.schedule import Event, Unit, events, plan_units

__all__ = ["ALGORITHM_VERSION", "Engine", "Event", "Unit", "events", "plan_units"]
