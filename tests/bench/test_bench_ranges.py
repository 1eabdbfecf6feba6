"""Rows with and without ``reduce_range`` are separate in all experiments."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from calibration_bench.core import registry
from calibration_bench.core.plotting import draw_plots
from calibration_bench.core.records import FORMAT_VERSION, Store
from calibration_bench.core.registry import ENTRIES, Entry, Measured
from calibration_bench.core.runner import run

RESULTS = Path(__file__).parents[2] / "calibration_bench" / "results"
FULL, REDUCED = "weights of the full range", "weights within -64..63"


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


SMALL: dict[str, dict[str, Any]] = {
    "quantization-accuracy": {"sources": "noise", "bits": "8"},
    "calibration-sources": {"sources": "noise", "counts": "4", "bits": "8"},
    "inversion-quality": {"methods": "noise", "iterations": "2", "bits": 8},
    "rebirth": {"variants": "dmi", "iterations": 4, "bits": 8},
}
"""The experiments that quantize, each with a single row to measure."""


def options(entry: Entry, weights: Path, data: Path, **changes: Any) -> Any:
    shared = {
        "model": "test_vit", "weights": weights, "img_size": 32, "data": str(data), "seeds": "3",
        "precision": "float32", "threads": 1,
    }  # fmt: skip
    known = {f.name for f in dataclasses.fields(entry.load().options)}
    images = {"images": 4} if "images" in known else {}
    return entry.load().options(**{**shared, **images, **SMALL[entry.name], **changes})


def as_version_1(path: Path) -> None:
    """Rewrite results as format version 1, without ``reduce_range``."""
    content = json.loads(path.read_text())
    for entry in content["rows"]:
        del entry["key"]["reduce_range"]
    path.write_text(json.dumps({**content, "format_version": 1}))


def test_every_experiment_that_quantizes_has_the_option() -> None:
    quantizing = {
        entry.name
        for entry in ENTRIES
        if "bits" in {f.name for f in dataclasses.fields(entry.load().options)}
    }
    assert quantizing == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_ranges_are_rows_and_tables_of_their_own(
    name: str, tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    entry = registry.entry(name)
    rows = []
    for reduced in (True, False):
        chosen = options(entry, small_weights, labeled_npz, reduce_range=reduced)
        (row,) = run(entry, chosen, tmp_path, Notes())["rows"]
        assert row["reduce_range"] is reduced
        rows.append(row)
    assert rows[0]["kl"] != rows[1]["kl"]
    store = Store(tmp_path, name)
    assert [row["reduce_range"] for row in store.rows()] == [True, False]
    titles = [table.title for table in entry.load().tables(store.rows()) if table.rows]
    assert all((REDUCED in title) != (FULL in title) for title in titles)
    assert sum(FULL in title for title in titles) == len(titles) / 2


@pytest.mark.parametrize("name", SMALL)
def test_the_default_is_the_range_that_dfq_takes(
    name: str, tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    entry = registry.entry(name)
    bench = registry.Bench(tmp_path, Notes())
    (key,) = entry.load().plan(options(entry, small_weights, labeled_npz), bench)
    assert key["reduce_range"] is True


def test_rows_of_version_1_are_of_the_full_range(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    entry = registry.entry("inversion-quality")
    full = options(entry, small_weights, labeled_npz, reduce_range=False)
    (old,) = run(entry, full, tmp_path, Notes())["rows"]
    path = tmp_path / "inversion-quality.json"
    as_version_1(path)
    before = path.read_bytes()
    notes = Notes()
    assert run(entry, full, tmp_path, notes)["rows"] == [old]
    assert "1 of 1 rows are stored already" in notes.lines
    assert path.read_bytes() == before
    run(entry, options(entry, small_weights, labeled_npz), tmp_path, Notes())
    content = json.loads(path.read_text())
    assert content["format_version"] == FORMAT_VERSION
    assert [entry["key"]["reduce_range"] for entry in content["rows"]] == [False, True]
    assert Store(tmp_path, "inversion-quality").rows()[0] == old


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: p.parent.name)
def test_committed_rows_are_of_the_range_that_their_code_had(path: Path, tmp_path: Path) -> None:
    """Weights have had a reduced range since 2026-11-26."""
    shutil.copy(path, tmp_path)
    content = Store(tmp_path, path.stem).read()
    assert content["format_version"] == FORMAT_VERSION
    for entry in content["rows"]:
        old = content["sessions"][entry["session"]]["date"] < "2026-11-26"
        expected = {"reduce_range": False} if old and "bits" in entry["key"] else {}
        assert expected.items() <= entry["key"].items()
        assert ("reduce_range" in entry["key"]) == ("bits" in entry["key"])


def test_rows_of_models_that_are_not_quantized_have_no_range(tmp_path: Path) -> None:
    store = Store(tmp_path, "evolution")
    store.put(Measured({"model": "m", "seed": 0}, {}), store.begin({}))
    content = json.loads(store.path.read_text())
    store.path.write_text(json.dumps({**content, "format_version": 1}))
    assert "reduce_range" not in store.rows()[0]


def test_versions_that_are_not_known_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, "evolution")
    store.begin({})
    content = json.loads(store.path.read_text())
    for version in (0, FORMAT_VERSION + 1, "1", None):
        store.path.write_text(json.dumps({**content, "format_version": version}))
        with pytest.raises(registry.UsageError, match="another format than dfq-bench 1 to"):
            store.read()


def test_plots_of_the_ranges_are_files_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    experiment = registry.entry("calibration-sources").load()
    shutil.copy(RESULTS / "calibration-sources.json", tmp_path)
    rows = Store(tmp_path, "calibration-sources").rows()
    rows += [{**row, "reduce_range": True} for row in rows]
    names = [path.stem for path in draw_plots(experiment.plots(rows), tmp_path)]
    assert "sources-demo-w4a8" in names
    assert "sources-demo-w4a8-full-range" in names
    assert len(set(names)) == len(names)
