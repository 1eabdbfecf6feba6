"""The bench's framework: options, resuming, records, reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from silent import Silent

from calibration_bench import cli
from calibration_bench.core import registry
from calibration_bench.core.everything import run_all
from calibration_bench.core.notes import Lines
from calibration_bench.core.options import numbers, option, words
from calibration_bench.core.records import Store, command_line
from calibration_bench.core.registry import Bench, Entry, Experiment, Key, Measured, Row, Table
from calibration_bench.core.report import cell, markdown, report
from calibration_bench.core.runner import run
from calibration_bench.measure.methods import Method, random_module, stages
from dfq import InversionSettings
from dfq.errors import DataError, SettingError, UsageError


@dataclass(frozen=True)
class Options:
    count: int = option(3, "Rows.")
    stop_at: int = option(-1, "Interrupt before this row.")
    seed: int = option(0, "Seed.")


MEASURED: list[int] = []


def _plan(options: Options, bench: Bench) -> list[Key]:
    bench.notes.note("planned")
    return [{"row": i, "seed": options.seed} for i in range(options.count)]


def _measure(options: Options, missing: list[Key], bench: Bench) -> Iterator[Measured]:
    bench.notes.note("measuring")
    for key in missing:
        if key["row"] == options.stop_at:
            yield Measured(key, {"value": -1.0}, complete=False)
            raise KeyboardInterrupt
        print("chatter of the measured code")
        MEASURED.append(key["row"])
        yield Measured(key, {"value": key["row"] / 2})


def _tables(rows: list[Row]) -> list[Table]:
    return [Table("Halves", {"row": "of", "value": "half"}, rows)]


class Fake(Entry):
    def load(self) -> Experiment:
        return Experiment(Options, _plan, _measure, _tables)


FAKE = Fake("fake", "Halves", "nothing")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    MEASURED.clear()
    monkeypatch.setattr(registry, "ENTRIES", (*registry.ENTRIES, FAKE))
    monkeypatch.setattr("calibration_bench.core.report.ENTRIES", registry.ENTRIES)
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.app(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(FAKE, Options(stop_at=1), tmp_path, Silent())
    assert MEASURED == [0]
    assert [r["complete"] for r in Store(tmp_path, "fake").rows()] == [True, False]
    outcome = run(FAKE, Options(), tmp_path, Silent())
    assert MEASURED == [0, 1, 2]
    assert [r["value"] for r in outcome["rows"]] == [0, 0.5, 1]
    assert [r["session"] for r in outcome["rows"]] == ["1", "2", "2"]


def test_rows_of_the_same_settings_are_measured_again_on_demand(tmp_path: Path) -> None:
    for _ in range(2):
        run(FAKE, Options(count=1), tmp_path, Silent())
    assert MEASURED == [0]
    run(FAKE, Options(count=1), tmp_path, Silent(), again=True)
    run(FAKE, Options(count=1, seed=7), tmp_path, Silent())
    assert MEASURED == [0, 0, 0]
    assert len(Store(tmp_path, "fake").rows()) == 2


def test_runs_at_the_same_time_lose_no_rows(tmp_path: Path) -> None:
    def add(number: int) -> None:
        store = Store(tmp_path, "fake")
        session = store.begin({"number": number})
        for row in range(5):
            store.put(Measured({"run": number, "row": row}, {}), session)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(4)))
    rows = Store(tmp_path, "fake").rows()
    sessions = Store(tmp_path, "fake").read()["sessions"]
    assert len(rows) == 20
    assert all(sessions[row["session"]]["number"] == row["run"] for row in rows)


def test_results_say_what_they_were_measured_on(tmp_path: Path) -> None:
    run(FAKE, Options(seed=5), tmp_path, Silent())
    content = json.loads((tmp_path / "fake.json").read_text())
    (session,) = content["sessions"].values()
    assert session["seed"] == 5
    assert session["hardware"]["threads"] >= 1
    assert session["hardware"]["torch_capability"]
    assert {"torch", "timm", "dfq", "dfq_code"} <= set(session["versions"])
    assert session["command"].startswith("calibration_bench")
    assert session["date"].endswith("+00:00")


def test_a_failed_write_leaves_the_rows_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(FAKE, Options(count=1), tmp_path, Silent())
    before = (tmp_path / "fake.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dfq.files.os.replace", full)
    with pytest.raises(UsageError, match="No space left"):
        run(FAKE, Options(count=2), tmp_path, Silent())
    assert (tmp_path / "fake.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["fake.json"]


HEAD = '{"format": "dfq-bench", "format_version": 2, "experiment": "fake", '


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": "other"}',
        HEAD + '"rows": [], "sessions": {"first": {}}}',
        HEAD + '"rows": {}, "sessions": {}}',
        HEAD + '"rows": [{"key": {}, "row": {}}], "sessions": {}}',
        HEAD
        + '"rows": [{"key": {}, "row": {}, "complete": true, "measured": "", "session": "1"}], '
        '"sessions": {}}',
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "fake.json").write_text(content)
    with pytest.raises(DataError, match=r"fake\.json"):
        run(FAKE, Options(), tmp_path, Silent())


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", "fake", "--count", "2", "--json")
    printed = json.loads(out)
    assert code == 0
    assert [row["value"] for row in printed["rows"]] == [0, 0.5]
    assert "chatter" in err
    assert Path("bench-results/fake.json").is_file()


def test_an_unknown_experiment_is_refused_with_a_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = call(capsys, "run", "inversion-sped")
    assert (code, out) == (2, "")
    assert "'inversion-speed'" in err
    assert "Traceback" not in err


def test_errors_are_json_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "run", "inversion-speed", "--methods", "pri", "--json")
    assert code == 2
    assert json.loads(out)["error"]["type"] == "SettingError"


def test_list_names_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["rows"]] == [e.name for e in registry.ENTRIES]


def test_every_experiment_has_documented_options() -> None:
    readme = (Path(cli.__file__).parent / "README.md").read_text()
    for entry in registry.ENTRIES[:-1]:
        assert f"run {entry.name}" in readme
        fields = entry.load().options.__dataclass_fields__.values()
        assert all(field.metadata["help"] for field in fields)


def test_the_report_needs_the_stored_results_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(FAKE, Options(), tmp_path, Silent())
    monkeypatch.setattr(sys.modules[__name__], "_measure", None)
    code, out, _ = call(capsys, "report", "--results", str(tmp_path))
    assert code == 0
    assert "| of | half |" in out
    assert "| 2 | 1 |" in out
    assert "Session 1" in out


def test_a_report_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results"):
        report(tmp_path)


def test_a_note_stands_below_its_table() -> None:
    text = markdown(Table("Halves", {"row": "of"}, [{"row": 1}], "Read it so."))
    assert text.endswith("| 1 |\n\nRead it so.")


def test_all_runs_what_it_should_and_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = (FAKE, Fake("other", "Halves", "nothing"), Fake("long", "Halves", "x", in_all=False))
    monkeypatch.setattr(registry, "ENTRIES", entries)
    code, out, err = call(capsys, "run", "all", "--json", "--jobs", "1")
    assert code == 0
    assert list(json.loads(out)) == ["fake", "other"]
    assert "other: measuring" in err
    assert MEASURED == [0, 1, 2] * 2
    code, out, _ = call(capsys, "run", "all", "--jobs", "1")
    assert out.count("**Halves**") == 2
    assert MEASURED == [0, 1, 2] * 2
    call(capsys, "run", "all", "--again", "--jobs", "1")
    assert MEASURED == [0, 1, 2] * 4


def test_several_experiments_run_at_once_and_their_errors_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("across-models", "inversion-floor")  # they load no model before they read results
    entries = [replace(registry.entry(n), in_all=True, alone=False) for n in names]
    monkeypatch.setattr(registry, "ENTRIES", entries)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    for name in names:
        (tmp_path / f"{name}.json").write_text("damaged")
    with pytest.raises(DataError, match=r"\.json' cannot be read as results"):
        list(run_all(tmp_path, Lines(), jobs=2))


def test_experiments_of_speed_run_alone() -> None:
    alone = {entry.name for entry in registry.ENTRIES if entry.in_all and entry.alone}
    assert alone == {"across-models"}
    with pytest.raises(SettingError, match="--jobs is 0; it must be at least 1"):
        list(run_all(Path("none"), Lines(), jobs=0))


def test_all_leaves_out_what_takes_more_than_the_demo() -> None:
    out = {entry.name for entry in registry.ENTRIES if not entry.in_all}
    assert out == {"inversion-speed", "inversion-floor", "gpu-check"}
    for entry in registry.ENTRIES[:-1]:
        if entry.in_all:
            options = entry.load().options()
            assert getattr(options, "model", "demo") == "demo"
            assert getattr(options, "seeds", "0,1,2") == "0,1,2"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "yes"),
        (0.123456, "0.1235"),
        (12345.6, "12346"),
        (7, "7"),
        ("a|b", "a\\|b"),
    ],
)
def test_cells(value: Any, text: str) -> None:
    assert cell(value) == text


def test_lists_are_checked() -> None:
    assert words("a, b,a", "--x") == ["a", "b"]
    assert numbers("3,1", "--x") == [3, 1]
    with pytest.raises(SettingError, match="Did you mean 'dmi'"):
        words("dmj", "--x", ["dmi", "smi"])
    with pytest.raises(SettingError, match="whole numbers"):
        numbers("1,-2", "--x")


@pytest.mark.parametrize(("name", "count"), [("dmi", 1), ("smi", 5), ("pri2", 2), ("pri7", 7)])
def test_a_short_run_has_the_stages_of_the_real_one(name: str, count: int) -> None:
    method = Method(name)
    real = method.settings(iterations=4000, unit_size=3)
    short = method.short(real, 6)
    assert [s.live for s in stages(short, 196)] == [s.live for s in stages(real, 196)]
    assert [s.length for s in stages(short, 196)] == [6] * count
    assert sum(s.length for s in stages(real, 196)) == 4000
    assert short.unit_size == 3


def test_stages_keep_their_places_where_iterations_are_few() -> None:
    few = stages(InversionSettings(method="smi", iterations=40), 196)
    assert [s.length for s in few] == [1, 0, 1, 1, 37]


def test_smi_stages_have_the_published_lengths() -> None:
    real = stages(InversionSettings(method="smi", iterations=4000), 196)
    assert [s.length for s in real] == [50, 50, 100, 100, 3700]


@pytest.mark.parametrize("name", ["pri", "pri0", "sm", "pri4x"])
def test_unknown_methods_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match="Unknown method"):
        Method(name)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(SettingError, match="timm has no model"):
        random_module("vit_huge_thing", 0)


BENCH = Path(__file__).parents[2] / "calibration_bench"


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    rendered = report(BENCH / "results")
    assert (BENCH / "results" / "TABLES.md").read_text() == rendered
    lines = (BENCH / "README.md").read_text().splitlines()
    shown = [line for line in lines if line.startswith(("| ", "**"))]
    assert shown
    assert set(shown) <= set(rendered.splitlines())


def test_commands_are_kept_without_absolute_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "run", "--results=/a/secret", "--data", "/b/c", "d/e"])
    assert command_line() == "calibration_bench run --results=.../secret --data .../c d/e"
