"""A run of an experiment without a word."""

from __future__ import annotations


class Silent:
    """Takes notes of a run and shows none."""

    def note(self, text: str) -> None:
        pass
