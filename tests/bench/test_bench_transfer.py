"""Students by source of their images: plan, runs, and tables from stored rows alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from silent import Silent

import dfq
from calibration_bench.core import registry
from calibration_bench.core.runner import run
from calibration_bench.experiments.knowledge_transfer.experiment import Options
from calibration_bench.experiments.knowledge_transfer.tables import transfer_tables
from calibration_bench.measure.sources import RealImages
from dfq import LoadedModel
from dfq.errors import DataError, SettingError

EXPERIMENT = registry.entry("knowledge-transfer")


def small(weights: Path, data: Path, **changes: Any) -> Options:
    options = {
        "model": "test_vit",
        "weights": weights,
        "img_size": 32,
        "data": str(data),
        "sources": "pri2,noise",
        "class_sources": "pri2",
        "images": 4,
        "budget": 1e-9,
        "iterations": 2,
        "one_class": 2,
        "depth": 1,
        "steps": 2,
        "batch": 4,
        "seeds": "3",
        "precision": "float32",
        "threads": 1,
    }
    return Options(**{**options, **changes})


def test_a_run_has_every_comparison_and_goes_on(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    with np.load(labeled_npz) as content:
        np.savez(tmp_path / "real.npz", x=255 - content["x"], y=content["y"])
    options = small(small_weights, labeled_npz, real=str(tmp_path / "real.npz"))
    outcome = run(EXPERIMENT, options, tmp_path, Silent())
    rows = outcome["rows"]
    assert [(r["comparison"], r["source"]) for r in rows] == [
        ("count", "pri2"),
        ("count", "noise"),
        ("count", "real"),
        ("time", "pri2"),
        ("class", "pri2"),
        ("class", "real"),
    ]
    assert [r["made"] for r in rows] == [4, 4, 4, 8, 4, 4]
    assert all(0 <= r["accuracy"] <= 1 and 0 <= r["agreement"] <= 1 for r in rows)
    timed = rows[3]
    assert timed["unit_images"] == 8
    assert timed["unit_seconds"] > 0
    assert rows[4]["others"] == 4
    assert len(outcome["tables"]) == 3
    kept = (tmp_path / "knowledge-transfer.json").read_bytes()
    assert not list((tmp_path / "scratch").iterdir())
    again = run(EXPERIMENT, options, tmp_path, Silent())
    assert again["rows"] == rows
    assert (tmp_path / "knowledge-transfer.json").read_bytes() == kept


def test_the_bench_measures_what_dfq_measures(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    options = small(small_weights, labeled_npz, comparisons="class", steps=6)
    (row,) = run(EXPERIMENT, options, tmp_path / "results", Silent())["rows"]
    inversion = {"stages": 2, "iterations": 2, "classes": [2], "precision": "float32", "threads": 1}
    expected = dfq.distill(
        "test_vit",
        weights=small_weights,
        img_size=32,
        depth=1,
        data="pri",
        images=4,
        steps=6,
        seed=3,
        settings={
            "inversion": inversion,
            "distillation": {"batch": 4, "smooth": (), "fractal": 0},
        },
        eval=labeled_npz,
        out=tmp_path / "student",
    )
    assert expected.accuracy is not None
    assert row["accuracy"] == pytest.approx(expected.accuracy.student)
    assert row["float_accuracy"] == pytest.approx(expected.accuracy.teacher)
    assert row["agreement"] == pytest.approx(expected.agreement)
    assert row["last_loss"] == pytest.approx(expected.losses[-1])
    mean = (4 * row["own_accuracy"] + 16 * row["others_accuracy"]) / 20
    assert mean == pytest.approx(row["accuracy"])


def test_a_budget_of_time_is_spent_in_whole_units(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "calibration_bench.experiments.knowledge_transfer.experiment._unit", lambda *_: (8, 0.3)
    )
    options = small(small_weights, labeled_npz, comparisons="time", budget=1.0)
    (row,) = run(EXPERIMENT, options, tmp_path, Silent())["rows"]
    assert row["made"] == 24
    assert row["budget"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparisons": "count,tiem"}, "Did you mean 'time'"),
        ({"sources": "prj4"}, "Unknown source 'prj4'"),
        ({"sources": "real"}, "give its images with --real"),
        ({"class_sources": "noise"}, "images have no labels"),
        ({"one_class": 5}, "--one-class is 5; the model has classes 0 to 4"),
        ({"budget": 0.0}, "--budget is 0.0"),
        ({"budget": float("inf")}, "--budget is inf"),
        ({"budget": 1e300}, "--budget is 1e.300"),
        ({"sources": "pri400", "iterations": 24}, "400"),
        ({"steps": 0}, "steps is 0"),
        ({"start": "scratch"}, "start is 'scratch'; allowed: auto, teacher, random"),
        ({"depth": 0}, "--depth is 0"),
    ],
    ids=str,
)
def test_mistakes_are_refused_before_work(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        run(EXPERIMENT, small(small_weights, labeled_npz, **changes), tmp_path, Silent())
    assert not list(tmp_path.iterdir())


def test_real_images_are_taken_by_class(loaded: LoadedModel, labeled_npz: Path) -> None:
    real = RealImages(loaded, str(labeled_npz), "demo", None, [3])
    assert len(real) == 4
    with np.load(labeled_npz) as content:
        wanted = {x.tobytes() for x in content["x"][content["y"] == 3]}
    patches = real.sample(4, 0).patches
    images = patches.reshape(4, 4, 4, 3, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(4, 16, 16, 3)
    assert {x.contiguous().numpy().tobytes() for x in images} == wanted
    with pytest.raises(DataError, match="has 4 of these classes"):
        real.sample(5, 0)


def test_tables_have_means_and_spreads_over_seeds() -> None:
    about = {
        "model": "m", "fingerprint": "f", "data": "d", "data_digest": "x", "test_images": 9,
        "float_accuracy": 0.9, "student": None, "depth": 2, "width": None, "heads": None,
        "start": "auto", "began_with": "teacher",
        "parameters": 500_000, "steps": 100, "batch": 32, "images": 8, "budget": None,
        "precision": "float32", "threads": 1, "iterations": 4, "invert_seconds": 2.0,
        "train_seconds": 3.0, "made": 8, "kl": 1.0, "last_loss": 0.5, "real": None,
    }  # fmt: skip
    one = {"own_accuracy": 1.0, "others_accuracy": 0.25, "teacher_others_accuracy": 0.9}
    rows = [
        {
            **about,
            **(one if comparison == "class" else {}),
            "comparison": comparison,
            "one_class": 2 if comparison == "class" else None,
            "source": source,
            "seed": seed,
            "accuracy": accuracy,
            "agreement": accuracy,
        }
        for comparison in ("count", "class")
        for source, accuracies in {"dmi": (0.25, 0.5), "pri4": (0.5, 0.5)}.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    count, single = transfer_tables(json.loads(json.dumps(rows)))
    assert [row["source"] for row in count.rows] == ["dmi", "pri4"]
    assert count.rows[0]["accuracy"] == pytest.approx(37.5)
    assert count.rows[0]["accuracy_error"] == pytest.approx(17.678, abs=1e-3)
    assert count.rows[1]["accuracy_error"] == 0
    assert count.rows[0]["seeds"] == 2
    assert "others_accuracy" not in count.columns
    assert single.title.startswith("8 images of class 2: a student like its teacher, depth 2")
    assert single.rows[0]["others_accuracy"] == 25
