"""Ctrl-C while modules load, and after."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from dfq.cli.interrupts import end_at_once, end_with_json, raise_once
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


@pytest.mark.parametrize("then", ["raise_once()", "end_with_json(); raise_once()"])
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
        "import signal\nfrom dfq.cli.interrupts import end_at_once, end_with_json, raise_once\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "end_at_once()\nend_with_json()\nraise_once()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_second_interrupt_does_not_disturb_the_end_of_the_first() -> None:
    program = """
import os, signal, sys
from dfq.cli.interrupts import end_at_once, ignore, raise_once
signal.signal(signal.SIGINT, signal.default_int_handler)
end_at_once()
raise_once()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(130)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_interrupt_after_the_result_does_not_change_the_exit_code() -> None:
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['dfq', 'recipes']\n"
        "from dfq.__main__ import main\n"
        "try:\n    main()\nfinally:\n    os.kill(os.getpid(), signal.SIGINT)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "w4a8" in ended.stdout
