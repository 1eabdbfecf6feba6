"""Bounds of the keywords of ``timm.create_model`` that give a model its shape."""

from __future__ import annotations

from typing import Any

BOUNDS: dict[str, tuple[float, float]] = {
    "in_chans": (1, 1024),
    "num_classes": (0, 1 << 20),
    "embed_dim": (1, 1 << 14),
    "depth": (1, 1 << 10),
    "num_heads": (1, 1 << 10),
    "mlp_ratio": (0.01, 64),
}
"""Bounds of keywords besides sizes in pixels; all but ``mlp_ratio`` are whole numbers."""

SIZES = ("img_size", "patch_size")
MAX_SIDE = 1 << 14
"""Largest side in pixels."""


def size_problem(key: str, value: Any) -> str | None:
    """Return what a keyword's value must be, None if it is that; other keywords than those of
    :data:`BOUNDS` and :data:`SIZES` have no bounds."""
    if key in BOUNDS:
        low, high = BOUNDS[key]
        kinds = (int, float) if key == "mlp_ratio" else (int,)
        if type(value) in kinds and low <= value <= high:
            return None
        return f"a {'' if key == 'mlp_ratio' else 'whole '}number from {low:g} to {high:,g}"
    if key in SIZES:
        sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        if all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            return None
        return f"one or two whole numbers from 1 to {MAX_SIDE}"
    return None
