"""Options of all commands: panels, metavars and help."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import pytest
from command_line import Cli
from surface import commands

from dfq.cli.options import PANELS
from dfq.cli.panels import panel_of

COMMANDS = dict(commands())

DIFFERENT = {
    "--data": "the student's training images, or images to evaluate on",
    "--images": "distillation takes more by default",
    "--out": "a checkpoint, a dataset, a student or an exported file",
    "--threads": "of inversion, or of every runtime that is measured",
    "--weights": "a model's file, or the type of an exported file's weights",
}
"""Options whose help differs between commands."""

METAVAR = re.compile(r"[A-Z][A-Z,|.]*|\[[a-z0-9_|-]+\]")


def options(name: str) -> list[Any]:
    """Options of a command in the order in which its help shows them."""
    command = COMMANDS[name]
    parameters = command.get_params(command.make_context(name, [], resilient_parsing=True))
    return [p for p in parameters if p.param_type_name == "option"]


EVERY = [(name, option) for name in COMMANDS for option in options(name)]

every_option = pytest.mark.parametrize(
    ("name", "option"), EVERY, ids=[f"{name} {option.opts[0]}" for name, option in EVERY]
)


@every_option
def test_every_option_has_a_panel(name: str, option: Any) -> None:
    assert panel_of(option) in PANELS, name


@every_option
def test_every_value_has_a_metavar_that_says_what_it_is(name: str, option: Any) -> None:
    assert option.is_flag or METAVAR.fullmatch(option.metavar), name


@every_option
def test_every_help_is_a_sentence(name: str, option: Any) -> None:
    assert option.help[0].isupper() or option.help.startswith(("4-bit", "timm's")), name
    assert option.help.endswith((".", "'demo'.")), name


@pytest.mark.parametrize("name", COMMANDS)
def test_panels_have_one_order(name: str) -> None:
    places = [PANELS.index(str(panel_of(option))) for option in options(name)]
    assert places == sorted(places)
    assert options(name)[-1].opts[0] in ("-h", "--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_have_upper_case_metavars(name: str) -> None:
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "argument":
            assert re.fullmatch(r"\[?[A-Z|]+\]?", parameter.metavar)


def test_an_option_means_the_same_in_every_command() -> None:
    meanings: dict[str, set[Any]] = {}
    for name, option in EVERY:
        kind = get_type_hints(COMMANDS[name].callback).get(option.name)
        said = (option.metavar, option.help, str(kind), str(option.show_default))
        meanings.setdefault(option.opts[0], set()).add(said)
    assert {flag for flag, said in meanings.items() if len(said) > 1} == set(DIFFERENT)


def test_help_shows_panels_in_order(cli: Cli) -> None:
    shown = cli("quantize", "--help").stdout
    titles = [f"─ {panel} ─" for panel in PANELS if panel != "Distillation"]
    places = [shown.index(title) for title in titles]
    assert places == sorted(places)
    assert "─ Options ─" not in shown
    assert "TEXT" not in shown
    assert "INTEGER" not in shown
