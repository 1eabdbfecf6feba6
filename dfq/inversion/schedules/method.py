"""What an inversion method is: its fields, and the events of a trajectory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from dfq.inversion.registry import Part

LeaveFirst = Literal["most", "least"]

OPTIMIZATION = frozenset({"iterations", "lr", "beta1", "beta2", "jitter", "flip", "plateau"})
"""Fields of the settings that every method reads which optimizes images."""

RANKING = frozenset({"importance"})
"""Fields that every method reads which ranks patches."""


@dataclass(frozen=True)
class Event:
    """After ``iteration`` steps ``count`` patches of each trajectory leave.

    ``kept`` events make an image of them; the others drop them.  With ``stays`` the image
    is a copy, and its patches go on.  ``leave_first`` are the most or the least important.
    """

    iteration: int
    count: int
    kept: bool
    stays: bool = False
    leave_first: LeaveFirst = "least"


class Method(Part):
    """An inversion method; a subclass is decorated with :func:`dfq.validation.settings`.

    Its fields are keys of a recipe; methods may share a field by inheriting it.
    """

    summary: ClassVar[str]
    """What it is, in a few words."""
    paper: ClassVar[str | None] = None
    """arXiv number."""
    optimizes: ClassVar[bool] = True
    """Whether there are iterations; where not, fields of optimization and losses are not read."""
    ranks: ClassVar[bool] = True
    """Whether patches leave by importance."""

    def events(self, iterations: int, patches: int) -> tuple[Event, ...]:
        """The events of a trajectory of so many iterations that starts with so many patches.

        Their iterations do not fall; the last is at the end.

        Raises:
            SettingError: the fields do not fit so many iterations or patches.
        """
        raise NotImplementedError

    def fitted(self, iterations: int, patches: int) -> Self:
        """This method with no more images of a trajectory than ``events`` can give."""
        del iterations, patches
        return self
