"""The command line's help, and real processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import FAST, Cli, assert_schema
from surface import commands
from trees import tree

import dfq
from dfq.results.values import QuantizeResult

COMMANDS = dict(commands())


every_command = pytest.mark.parametrize("name", COMMANDS)


@every_command
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(name: str, flag: str, cli: Cli) -> None:
    ended = cli(*name.split(), flag)
    assert ended.code == 0
    assert COMMANDS[name].help.split("\n")[0].rstrip(".")[:40] in ended.stdout


@every_command
def test_every_command_shows_an_example(name: str, cli: Cli) -> None:
    shown = cli(*name.split(), "--help").stdout
    assert f"Example: dfq {name}" in shown
    assert "[bold]" not in shown


@every_command
def test_every_example_can_be_parsed(name: str) -> None:
    example = COMMANDS[name].epilog.removeprefix("Example: [bold]").removesuffix("[/]")
    words = shlex.split(example)[1 + len(name.split()) :]
    assert COMMANDS[name].make_context(name, words).params


@every_command
def test_every_option_is_explained(name: str) -> None:
    assert all(p.help for p in COMMANDS[name].params if p.name != "help")


@pytest.mark.parametrize("args", [["--help"], ["-h"]], ids=str)
def test_help_lists_every_command(args: list[str], cli: Cli) -> None:
    shown = cli(*args).stdout
    assert all(name.split()[0] in shown for name in COMMANDS)


def test_the_version_is_printed(cli: Cli) -> None:
    ended = cli("--version")
    assert (ended.code, ended.stdout) == (0, f"dfq {dfq.__version__}\n")


# ---- real processes


def process(args: list[str], cache: Path) -> subprocess.Popen[str]:
    """Start ``python -m dfq`` so that SIGINT interrupts it, even if this process ignores SIGINT."""
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('dfq', run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DFQ_CACHE": str(cache)},
    )


def test_a_process_prints_the_result_alone_on_stdout(cli: Cli, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dfq", "quantize", *cli.model, *FAST, "--json"]
    command += ["--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert_schema(json.loads(ended.stdout), QuantizeResult)
    assert "Inverting" in ended.stderr


def test_a_process_ends_a_mistake_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dfq", "quantize", "vit_bse", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: Unknown model 'vit_bse'")
    assert "Traceback" not in ended.stderr


def test_a_process_says_its_version() -> None:
    command = [sys.executable, "-m", "dfq", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == f"dfq {dfq.__version__}\n"


@pytest.mark.skipif(os.name != "posix", reason="SIGINT is sent to a process")
def test_an_interrupted_inversion_goes_on_to_the_same_bytes(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[inversion]\nunit_size = 1\nimages = 12\nstages = 2\niterations = 20\n")
    args = ["invert", *cli.model, "--recipe", str(recipe), "--threads", "1", "--out"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"

    running = process([*args, str(broken)], tmp_path / "cache")
    while running.poll() is None and not list(broken.glob("shard-00000-*.safetensors")):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130
    assert "Interrupted" in said
    assert "Traceback" not in said
    assert not (broken / "manifest.json").exists()

    again = process([*args, str(broken)], tmp_path / "cache")
    _, said = again.communicate()
    assert again.returncode == 0
    assert "Resuming: " in said

    assert cli(*args, whole).code == 0
    assert tree(broken) == tree(whole)
