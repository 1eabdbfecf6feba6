"""Ctrl-C while modules load, and after."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import os, signal, sys
from dfq.cli.interrupts import end_at_once, raise_again
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
sys.argv[1:] = {words}
end_at_once()
{then}
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    sys.exit("raised")
"""


def run(then: str = "", words: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(then=then, words=list(words))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_a_program_that_loads_ends_at_once() -> None:
    ended = run()
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")


def test_json_says_so_too() -> None:
    ended = run(words=("quantize", "--json"))
    assert ended.returncode == 130
    assert json.loads(ended.stdout)["error"]["type"] == "KeyboardInterrupt"


def test_work_that_began_hears_of_it() -> None:
    ended = run("raise_again()")
    assert (ended.returncode, ended.stderr) == (1, "raised\n")


def test_a_handler_of_the_callers_stays() -> None:
    program = (
        "import signal\nfrom dfq.cli.interrupts import end_at_once, raise_again\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nend_at_once()\nraise_again()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
