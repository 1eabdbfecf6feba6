"""Isolation from the caller's process: nesting, threads, errors, warnings."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callers_process import Given, default_type, run_together, state

import dfq
from dfq.arguments import checked
from dfq.process_state import callers_state, fresh_state

ROOT = Path(__file__).parents[1]


# ---- the guard itself


def test_what_is_set_inside_is_put_back_after_an_error() -> None:
    @checked
    def careless() -> None:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(3)
        raise ZeroDivisionError

    before = state()
    with pytest.raises(ZeroDivisionError):
        careless()
    assert state() == before


def test_random_numbers_of_gpus_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["before"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: kept[-1])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", kept.append)
    with fresh_state():
        kept.append("consumed")
    assert kept == ["before", "consumed", "before"]


def test_only_the_outermost_call_sets_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    monkeypatch.setattr("dfq.process_state._enter_thread", lambda _: entered.append(""))

    @checked
    def inner() -> None:
        pass

    @checked
    def outer() -> None:
        inner()
        inner()

    outer()
    assert len(entered) == 1


def test_threads_that_overlap_leave_what_the_first_found() -> None:
    """In whatever order they leave."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen: list[torch.dtype] = []

    def first() -> None:
        with fresh_state():
            first_in.set()
            second_in.wait(60)
        first_out.set()

    def second() -> None:
        first_in.wait(60)
        with fresh_state():
            second_in.set()
            first_out.wait(60)
            seen.append(torch.get_default_dtype())

    with default_type(torch.float64):
        before = state()
        run_together([first, second])
        assert state() == before
    assert seen == [torch.float32]


def test_what_another_thread_sets_meanwhile_stays_set() -> None:
    def other() -> None:
        torch.set_default_dtype(torch.bfloat16)
        with fresh_state():
            assert torch.get_default_dtype() == torch.float32

    with default_type(torch.float64):
        with fresh_state():
            run_together([other])
        assert torch.get_default_dtype() == torch.bfloat16


def test_the_callers_code_runs_in_the_callers_state(given_files: Given, tmp_path: Path) -> None:
    seen: list[Any] = []

    def units() -> Iterator[list[dfq.SparseImages]]:
        seen.append((torch.get_default_dtype(), torch.is_grad_enabled(), float(torch.rand(()))))
        yield from given_files.units
        seen.append((torch.get_default_dtype(), torch.is_grad_enabled(), float(torch.rand(()))))

    with default_type(torch.float64), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        wanted = [float(torch.rand(())) for _ in range(3)]
        torch.manual_seed(0)
        dfq.write_dataset(tmp_path / "set", units(), given_files.loaded, origin="mine")
        after = float(torch.rand(()))
    assert [place[:2] for place in seen] == [(torch.float64, False)] * 2
    assert [place[2] for place in seen] + [after] == wanted


def test_the_callers_state_is_everywhere_outside() -> None:
    with default_type(torch.float64), callers_state():
        assert torch.get_default_dtype() == torch.float64


# ---- warnings


@checked
def warns() -> int:
    warnings.warn("deliberate", UserWarning, stacklevel=1)
    return 3


def test_warnings_are_shown_where_the_caller_has_them_raised() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "quiet")
        assert warns() == 3
        assert [str(w.message) for w in shown] == ["deliberate"]
        with pytest.raises(UserWarning, match="deliberate"):
            warnings.warn("deliberate", UserWarning, stacklevel=1)


def test_what_the_caller_ignores_stays_ignored() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("ignore")
        assert warns() == 3
    assert not shown


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False
    )


def test_a_process_that_raises_warnings_quantizes_all_the_same(given_files: Given) -> None:
    """Modules that load give warnings too."""
    code = f"""
import warnings, dfq
print(dfq.load({str(given_files.checkpoint)!r}).backend, warnings.filters[0][0])
dfq.inspect({str(given_files.images)!r})
"""
    ended = python(code, "-W", "error")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [dfq.load(given_files.checkpoint).backend, "error"]


def test_modules_load_as_in_a_fresh_process() -> None:
    """timm's and ours keep tensors that they make as they load."""
    code = """
import torch
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
import dfq
print(dfq.load_model("demo").fingerprint, torch.get_default_dtype(), torch.get_default_device())
"""
    ended = python(code)
    wanted = f"{dfq.load_model('demo').fingerprint} torch.float64 meta"
    assert ended.stdout.strip() == wanted, ended.stderr


def test_a_warning_inside_fails_the_tests(tmp_path: Path) -> None:
    """Warnings are errors in this project's own tests, and a call does not hide them."""
    (tmp_path / "test_warns.py").write_text(
        "import warnings\n"
        "from dfq.arguments import checked\n"
        "@checked\n"
        "def warns(): warnings.warn('deliberate')\n"
        "def test_warns(): warns()\n"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "recorded_warnings", "-p", "no:cacheprovider",
         "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, tmp_path / "test_warns.py"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert ended.returncode == 1, ended.stdout
    assert "1 passed" in ended.stdout
    assert "WARNED test_warns.py::test_warns: deliberate" in ended.stdout
