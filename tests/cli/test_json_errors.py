"""With ``--json`` an error is one JSON object, as the parser understood the flag."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import MODEL, Cli
from typer.testing import CliRunner

from dfq.cli.app import app

MISTAKES = [
    (["quantise"], "UsageError"),
    (["--nothing"], "UsageError"),
    (["quantize"], "UsageError"),
    (["quantize", "demo", "--nothing"], "UsageError"),
    (["quantize", "demo", "--bits", "four"], "UsageError"),
    (["quantize", "demo", "--bits", "99"], "SettingError"),
    (["quantize", "demo", "--out="], "UsageError"),
    (["inspect", "nothing"], "UnknownModelError"),
    (["cache", "remove"], "UsageError"),
    (["cache", "lost"], "UsageError"),
]


@pytest.mark.parametrize("argv", [[], ["other", "--json"], ["other", "quantize"]], ids=str)
@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(("words", "kind"), MISTAKES, ids=str)
def test_an_error_is_json_if_the_command_line_asks(
    words: list[str], kind: str, as_json: bool, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ``sys.argv`` is."""
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    ended = CliRunner().invoke(app, [*words, "--json"] if as_json else words)
    assert ended.exit_code == 2
    assert ended.stderr
    if as_json:
        assert json.loads(ended.stdout)["error"]["type"] == kind
    else:
        assert ended.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "--", "--json"],
        ["inspect", "nothing", "--preview", "--json"],
    ],
    ids=str,
)
def test_a_value_is_no_flag(words: list[str]) -> None:
    ended = CliRunner().invoke(app, words)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr


def test_the_arguments_of_the_process_are_those_of_a_call_without_any(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dfq", "inspect", "nothing", "--json"])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 2
    assert "error" in json.loads(capsys.readouterr().out)


# ---- --no-evaluate


def test_without_measuring_fields_are_null(cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--no-evaluate", "--json")
    assert ended.code == 0
    for name in ("agreement", "agreement_on", "agreement_outside", "accuracy", "accuracy_top5"):
        assert ended.json[name] is None
    assert "held-out" not in ended.stderr
    assert "not measured" in cli("inspect", tmp_path / "out").stdout


@pytest.mark.parametrize(
    "flags", [["--eval", "demo"], ["--min-agreement", "0.5"], ["--min-accuracy", "0.5"]], ids=str
)
def test_measuring_and_not_is_a_usage_error(flags: list[str], cli: Cli, tmp_path: Path) -> None:
    ended = cli.quantize(tmp_path / "out", "--no-evaluate", *flags, "--json")
    assert ended.code == 2
    assert flags[0] in ended.json["error"]["message"]
    assert "--no-evaluate" in ended.json["error"]["message"]
    assert not (tmp_path / "out").exists()


# ---- what is replaced


def test_what_is_replaced_is_noted(cli: Cli, tmp_path: Path) -> None:
    for bits, before in (("8", None), ("8", f"{MODEL} w8a8"), ("4", f"{MODEL} w8a8")):
        ended = cli.quantize(tmp_path / "out", "--bits", bits, "--no-evaluate")
        noted = [line for line in ended.stderr.splitlines() if "will be replaced" in line]
        assert len(noted) == (before is not None)
        assert all(f"holds {before}," in line for line in noted)
