"""Progress of long work: who shows it, what is shown, and the time that is left."""

from __future__ import annotations

import ast
import inspect
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group

import dfq
from dfq import bars
from dfq.bars import Bars, Lines, drawn
from dfq.errors import SettingError
from dfq.job import UNITS, Job, Stage, Timer, unit_of
from dfq.progress import Advance, Silent, announce, resolve_progress
from dfq.text import clock_time, duration

ROOT = Path(__file__).parents[1]


class Clock:
    """Clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def started(job: Job, task: str, total: int, clock: Clock) -> Timer:
    timer = Timer(total, clock)
    job.start(task, timer)
    return timer


def at(timer: Timer, clock: Clock, done: int, now: float) -> None:
    timer.done, clock.now = done, now


# ---- times


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (5.4, "0:05"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3600, "1:00:00"),
        (5025, "1:23:45"),
    ],
)
def test_clock_times(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1:00"), (3725, "1:02:05")]
)
def test_durations_are_seconds_below_a_minute(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_task_goes_on_at_its_speed_so_far() -> None:
    clock = Clock()
    timer = Timer(100, clock)
    at(timer, clock, 25, 10.0)
    assert timer.elapsed == 10
    assert timer.remaining == 30


@pytest.mark.parametrize(("done", "now"), [(0, 60.0), (4, 60.0), (50, 0.5)])
def test_the_speed_of_a_task_that_has_just_begun_is_unknown(done: int, now: float) -> None:
    clock = Clock()
    timer = Timer(100, clock)
    at(timer, clock, done, now)
    assert timer.remaining is None


def test_later_stages_take_as_long_per_work_as_those_before() -> None:
    clock, job = (
        Clock(),
        Job([Stage("Inverting", 300), Stage("Quantizing", 0), Stage("Evaluating", 600)]),
    )
    timer = started(job, "Inverting 8 images (pri)", 10, clock)
    at(timer, clock, 5, 15.0)
    left = job.remaining
    assert left is not None
    assert (left.seconds, left.exact) == (15 + 600 * 15 / 150, False)
    assert job.position == "stage 1 of 3"


def test_the_last_stage_is_timed_by_itself() -> None:
    clock, job = Clock(), Job([Stage("Inverting", 300), Stage("Evaluating", 600)])
    at(started(job, "Inverting", 10, clock), clock, 10, 30.0)
    job.finish()
    timer = started(job, "Evaluating", 100, clock)
    at(timer, clock, 20, 32.0)
    left = job.remaining
    assert left is not None
    assert (left.seconds, left.exact) == (8.0, True)


def test_time_of_unknown_work_tells_nothing_of_other_stages() -> None:
    stages = [Stage("Calibrating", 100), Stage("Quantizing", 0), Stage("Evaluating", 50)]
    clock, job = Clock(), Job(stages)
    at(started(job, "Calibrating", 10, clock), clock, 10, 20.0)
    job.finish()
    timer = started(job, "Quantizing", 4, clock)
    at(timer, clock, 2, 120.0)
    left = job.remaining
    assert left is not None
    assert left.seconds == 100 + 50 * 20 / 100


def test_a_stage_that_is_skipped_counts_neither_work_nor_time() -> None:
    stages = [
        Stage("Inverting", 900),
        Stage("Calibrating", 10),
        Stage("Inverting", 20),
        Stage("Comparing", 5),
    ]
    clock, job = Clock(), Job(stages)
    at(started(job, "Calibrating", 10, clock), clock, 10, 4.0)
    assert job.position == "stage 2 of 4"
    job.finish()
    assert job.position is None
    timer = started(job, "Inverting 16 held-out images (pri)", 10, clock)
    assert job.position == "stage 3 of 4"
    at(timer, clock, 5, 8.0)
    left = job.remaining
    assert left is not None
    assert left.seconds == 4 + 5 * 8 / 20


def test_a_task_that_is_no_stage_has_no_place_in_the_job() -> None:
    clock, job = Clock(), Job([Stage("Inverting", 1), Stage("Evaluating", 1)])
    started(job, "Building", 3, clock)
    assert job.position is None
    assert job.remaining is None


def task_names() -> list[str]:
    """Names of all tasks in dfq, whose formatted parts are left out."""
    names = []
    for path in sorted((ROOT / "dfq").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == "task" and len(node.args) == 2:
                names.append(ast.unparse(node.args[0]).lstrip("f'"))
    return names


def test_every_task_says_what_it_counts() -> None:
    names = [name for name in task_names() if name != "name"]  # a variable, of synthesis
    assert len(names) >= 8
    assert {name.partition(" ")[0].rstrip("'") for name in names} <= set(UNITS)
    assert unit_of("Inverting 32 images (pri)") == "iterations"


# ---- what is shown


def shown(width: int, name: str = "Inverting 32 images (pri)") -> list[str]:
    clock, job = Clock(), Job([Stage("Inverting", 700), Stage("Evaluating", 350)])
    timer = started(job, name, 38400, clock)
    at(timer, clock, 9600, 75.0)
    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(Group(*drawn(name, timer, job, width)))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_wide_terminal_has_a_line_for_the_task_and_one_for_the_job() -> None:
    first, second = shown(80)
    assert first.startswith("Inverting 32 images (pri) ━━━")
    assert first.endswith(" 9600/38400 iterations  1:15, 3:45 left")
    assert second == "stage 1 of 2, in all at least 6:15 left"


def test_a_narrow_terminal_has_short_lines() -> None:
    lines = shown(40)
    assert lines[:2] == ["Inverting 32 images (pri)", "9600/38400 iterations  1:15, 3:45 left"]
    assert lines[2].startswith("━━━━━━━━━━")
    assert lines[3] == "stage 1 of 2, in all at least 6:15 left"


@pytest.mark.parametrize("width", [20, 40, 75, 76, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    lines = shown(width, "Inverting 32 images of a method with quite a long name (pri)")
    assert len(lines) == (2 if width >= bars.WIDE else 4)
    assert max(map(len, lines)) <= width


def test_a_log_has_a_line_for_every_tenth() -> None:
    clock, job = Clock(), Job([Stage("Inverting", 700), Stage("Evaluating", 350)])
    timer = started(job, "Inverting", 40, clock)
    lines = Lines("Inverting", timer, job)
    assert lines.first() == "Inverting: 40 iterations (stage 1 of 2)"
    said = []
    for step in range(40):
        clock.now = step + 1.0
        said.append(lines.advance(1))
    texts = [text for text in said if text is not None]
    assert len(texts) == 10
    assert texts[0] == "Inverting: 4/40 iterations, 0:04, 0:36 left, in all at least 0:56 left"
    assert texts[-1] == "Inverting: 40/40 iterations, 0:40, in all at least 0:20 left"


def test_bars_on_a_terminal_are_erased_at_the_end() -> None:
    file = io.StringIO()
    progress = Bars(Console(file=file, force_terminal=True, width=80, highlight=False))
    with progress.task("Calibrating", 4) as advance:
        advance(4)
        progress.note("a [note]\x1b")
    assert "0/4 images" in file.getvalue()
    assert "a [note]\\x1b" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize("terminal", [{"TERM": "dumb"}, {}], ids=["dumb", "none"])
def test_lines_are_plain_where_nothing_can_be_drawn(terminal: dict[str, str]) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=bool(terminal), width=80, _environ=terminal)
    with Bars(console).task("Calibrating", 4) as advance:
        advance(4)
    assert file.getvalue() == "Calibrating: 4 images\nCalibrating: 4/4 images, 0:00\n"


def test_a_notebook_without_widgets_has_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_jupyter=True)
    monkeypatch.setattr(bars.importlib.util, "find_spec", lambda _: None)
    assert not bars._is_drawable(console)
    monkeypatch.setattr(bars.importlib.util, "find_spec", lambda name: name)
    assert bars._is_drawable(console)


# ---- who shows it


class Listening:
    """Progress of a caller, with the two methods that every one has."""

    def task(self, _name: str, _total: int) -> AbstractContextManager[Advance]:
        return nullcontext(lambda _: None)

    def note(self, text: str) -> None:
        pass


class Announcing(Listening):
    """Progress that is told the stages too."""

    stages: Sequence[Stage] = ()

    def announce(self, stages: Sequence[Stage]) -> None:
        self.stages = stages


def test_progress_is_bars_none_or_the_callers() -> None:
    own = Listening()
    assert isinstance(resolve_progress(True), Bars)
    assert isinstance(resolve_progress(False), Silent)
    assert isinstance(resolve_progress(None), Silent)
    assert resolve_progress(own) is own


def test_only_the_first_of_several_workers_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    assert isinstance(resolve_progress(True), Silent)
    monkeypatch.setenv("RANK", "0")
    assert isinstance(resolve_progress(True), Bars)


def test_stages_are_announced_to_those_who_take_them() -> None:
    stages, told = [Stage("Inverting", 1.0)], Announcing()
    announce(Listening(), stages)
    announce(told, stages)
    assert told.stages == stages


def with_progress() -> list[str]:
    functions = [n for n in dfq.__all__ if inspect.isfunction(getattr(dfq, n))]
    return [n for n in functions if "progress" in inspect.signature(getattr(dfq, n)).parameters]


def test_the_long_verbs_have_progress() -> None:
    assert with_progress() == ["benchmark", "distill", "evaluate", "invert", "quantize"]


@pytest.mark.parametrize("name", with_progress())
@pytest.mark.parametrize("progress", [1, "yes", object()], ids=["1", "text", "object"])
def test_other_progress_is_refused(name: str, progress: Any) -> None:
    required = [
        p for p in inspect.signature(getattr(dfq, name)).parameters.values() if p.default is p.empty
    ]
    with pytest.raises(SettingError, match=r"progress is .*; it takes Progress, bool or None\."):
        getattr(dfq, name)(**{p.name: "demo" for p in required}, progress=progress)


def test_bars_of_the_api_go_to_stderr(
    small_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    effort: dict[str, Any] = {"iterations": 4, "images": 4, "stages": 2, "threads": 1}
    model: dict[str, Any] = {"weights": small_weights, "img_size": 32, "cache": tmp_path / "cache"}
    dfq.invert("test_vit", **model, **effort, progress=False)
    assert capsys.readouterr() == ("", "")
    dfq.quantize("test_vit", **model, **effort, out=tmp_path / "out", seed=1, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Inverting 4 images (pri): 4 iterations (stage 1 of 5)" in printed.err
    assert "(stage 2 of 5)" in printed.err
    assert "Comparing on fractal noise: 32 images (stage 5 of 5)" in printed.err
