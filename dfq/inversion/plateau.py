"""Early stopping of a stage."""

from __future__ import annotations


class Plateau:
    """Detector of a loss that has stopped falling, from the losses of one unit of work.

    The loss jumps with the jitter, so means over windows of ``patience`` iterations are
    compared: it has stopped when a window's mean is not ``TOLERANCE`` below the last one's.
    """

    TOLERANCE = 0.02

    def __init__(self, patience: int) -> None:
        """Create a detector; a ``patience`` of 0 iterations never stops."""
        self.patience = patience
        self._window: list[float] = []
        self._last: float | None = None

    def reached(self, loss: float) -> bool:
        """Add the loss of an iteration; return whether the loss has stopped falling."""
        if not self.patience:
            return False
        self._window.append(loss)
        if len(self._window) < self.patience:
            return False
        mean = sum(self._window) / self.patience
        self._window.clear()
        last, self._last = self._last, mean
        return last is not None and mean > last - self.TOLERANCE * abs(last)
