"""Progress messages."""

from __future__ import annotations

import time

from rich.console import Console

from dfq.text import escape


class Lines:
    """Progress messages on stderr, each with the seconds since the start and a prefix."""

    def __init__(self, about: str = "", started: float | None = None) -> None:
        """``about``: prefix of the messages.  ``started``: seconds since the epoch; else now."""
        self.about = f"{about}: " if about else ""
        self.started = time.time() if started is None else started
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        after = time.time() - self.started
        self.console.print(f"[dim]{after:8.1f} s[/] {escape(self.about + text)}")
