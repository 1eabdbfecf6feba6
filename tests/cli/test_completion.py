"""Shell completion through environment variables, as shells request it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dfq.inversion.schedules import METHODS
from dfq.recipe_files import shipped_recipes


def run(*args: str, **variables: str) -> str:
    command = [sys.executable, "-m", "dfq", *args]
    environment = {**os.environ, **variables}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return ended.stdout


def completed(words: str) -> list[str]:
    """Return bash's completions of the last word."""
    place = len(words.split(" ")) - 1
    return run(COMP_WORDS=words, COMP_CWORD=str(place), _DFQ_COMPLETE="complete_bash").split()


def test_the_script_of_bash_completes_dfq() -> None:
    shown = run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_DFQ_COMPLETE=complete_bash" in shown
    assert "complete -o default -F _dfq_completion dfq" in shown


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("dfq quan", ["quantize"]),
        ("dfq quantize vit_b", ["vit_base"]),
        ("dfq invert dem", ["demo"]),
        ("dfq inspect deit_tin", ["deit_tiny", "deit_tiny_distilled_patch16_224"]),
        ("dfq invert demo --method ", list(METHODS)),
        ("dfq quantize demo --calibration s", ["smi"]),
        ("dfq quantize demo --precision b", ["bfloat16"]),
        ("dfq quantize demo --recipe paper", [n for n in shipped_recipes() if "paper" in n]),
        ("dfq quantize images/", []),
    ],
    ids=str,
)
def test_names_are_completed(words: str, offered: list[str]) -> None:
    actual = completed(words)
    assert actual[: len(offered)] == offered
    assert bool(actual) == bool(offered)


def test_refused_models_are_not_offered() -> None:
    assert completed("dfq quantize vit_base_patch16_rpn") == []


def test_completion_loads_neither_torch_nor_timm() -> None:
    code = (
        "import sys; from dfq.cli import completion; completion.models(''); "
        "completion.recipes(''); print(sorted({'torch', 'timm', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
