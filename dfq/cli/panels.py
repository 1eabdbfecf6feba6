"""Help with options in panels, in the same order for every command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand

from dfq.cli.options import OUTPUT, PANELS


def panel_of(parameter: Any) -> str | None:
    """Return the panel of an option; None of an argument."""
    return getattr(parameter, "rich_help_panel", None)


class Command(TyperCommand):
    """Command that sorts its options by panel and has ``--help`` in the last one."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments, then options by panel; within a panel in the order of the code."""
        return sorted(super().get_params(ctx), key=_place)

    def get_help_option(self, ctx: Any) -> Any:
        """Return ``--help``."""
        option: Any = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = OUTPUT
        return option


def _place(parameter: Any) -> int:
    panel = panel_of(parameter)
    return 1 + PANELS.index(panel) if panel in PANELS else 0


class App(typer.Typer):
    """Typer whose commands are :class:`Command`."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """Return the decorator of a command."""
        return super().command(*args, **{"cls": Command, **options})
