"""Silent runs of experiments."""

from __future__ import annotations


class Silent:
    """Progress messages that are not shown."""

    def note(self, text: str) -> None:
        pass
