"""Ctrl-C while modules load, and after."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from dfq.cli.interrupts import end_at_once, end_with_json, raise_again
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
end_at_once()
{then}
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    sys.exit("raised")
"""


def run(then: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(then=then)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_program_that_loads_ends_at_once() -> None:
    ended = run()
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")


def test_json_says_so_too_once_it_is_parsed() -> None:
    ended = run("end_with_json()")
    assert (ended.returncode, ended.stderr) == (130, "Interrupted.\n")
    assert json.loads(ended.stdout)["error"]["type"] == "KeyboardInterrupt"


@pytest.mark.parametrize("then", ["raise_again()", "end_with_json(); raise_again()"])
def test_work_that_began_hears_of_it(then: str) -> None:
    ended = run(then)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "raised\n")


def test_the_parser_says_whether_there_is_json() -> None:
    parsed = "from dfq.cli.app import app; app({words}, standalone_mode=False)"
    for words, written in ((["recipes", "--json"], True), (["recipes"], False)):
        ended = run(parsed.format(words=words))
        assert ended.returncode == 130
        assert ("KeyboardInterrupt" in ended.stdout) == written


def test_a_handler_of_the_callers_stays() -> None:
    program = (
        "import signal\nfrom dfq.cli.interrupts import end_at_once, end_with_json, raise_again\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "end_at_once()\nend_with_json()\nraise_again()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
