"""When a stage has nothing left to gain."""

from __future__ import annotations


class Plateau:
    """Tells that a loss has stopped falling, from the losses of one unit of work alone.

    The loss jumps with the jitter, so means over windows of ``patience`` iterations are
    compared: it has stopped when a window's mean is not ``TOLERANCE`` below the last one's.
    """

    TOLERANCE = 0.02

    def __init__(self, patience: int) -> None:
        """``patience`` is in iterations; 0 never stops."""
        self.patience = patience
        self._window: list[float] = []
        self._last: float | None = None

    def reached(self, loss: float) -> bool:
        """Take the loss of one more iteration into account."""
        if not self.patience:
            return False
        self._window.append(loss)
        if len(self._window) < self.patience:
            return False
        mean = sum(self._window) / self.patience
        self._window.clear()
        last, self._last = self._last, mean
        return last is not None and mean > last - self.TOLERANCE * abs(last)
