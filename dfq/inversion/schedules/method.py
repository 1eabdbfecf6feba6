"""Base class of inversion methods, and the events of a trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from dfq.inversion.registry import Component

LeaveFirst = Literal["most", "least"]
Importance = Literal["auto", "attention", "gradient", "activation", "random"]
"""Measures of the importance of patches; ``auto`` leaves the choice to the model's pooling."""

OPTIMIZATION = frozenset({"iterations", "lr", "beta1", "beta2", "jitter", "flip", "plateau"})
"""Fields that all methods with ``optimizes`` read."""

RANKING = frozenset({"importance"})
"""Fields that methods with ``ranks`` read."""


@dataclass(frozen=True)
class Event:
    """Removal of ``count`` patches from each trajectory after ``iteration`` iterations.

    With ``kept`` the removed patches become an image, otherwise they are discarded.  With
    ``stays`` the image is a copy, and its patches remain.  ``leave_first``: whether the most or
    the least important patches are removed.
    """

    iteration: int
    count: int
    kept: bool
    stays: bool = False
    leave_first: LeaveFirst = "least"


class Method(Component):
    """An inversion method; a subclass is decorated with :func:`dfq.validation.settings`.

    Its fields are keys of a recipe; methods may share a field by inheriting it.
    """

    summary: ClassVar[str]
    """Description in a few words."""
    paper: ClassVar[str | None] = None
    """arXiv number."""
    optimizes: ClassVar[bool] = True
    """Whether images are optimized; if not, fields of optimization and losses are not read."""
    ranks: ClassVar[bool] = True
    """Whether patches are removed by importance; if not, every event removes all that are left."""

    def events(self, iterations: int, patches: int) -> tuple[Event, ...]:
        """Return the events of a trajectory of ``iterations`` that starts with ``patches`` patches.

        Their iterations do not decrease; the last event is at the end.

        Raises:
            SettingError: the fields do not fit so many iterations or patches.
        """
        raise NotImplementedError

    def ranking(self, asked: Importance) -> Importance:
        """Return the measure by which patches are ranked; by default the one of the settings.

        What it returns is recorded with the images as ``importance``.
        """
        return asked

    def fitted(self, iterations: int, patches: int) -> Self:
        """Return a copy with at most as many images per trajectory as ``events`` can give."""
        del iterations, patches
        return self
