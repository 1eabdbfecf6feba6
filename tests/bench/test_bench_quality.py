"""Accuracy over iterations, and the knee."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from silent import Silent

import dfq
from calibration_bench.core import registry
from calibration_bench.core.runner import run
from calibration_bench.core.tables import quality_plots, quality_tables
from calibration_bench.experiments.inversion_quality.experiment import FLOATS, Options
from dfq.errors import SettingError

MODEL = "test_vit"
QUALITY = registry.entry("inversion-quality")


def small(weights: Path, data: Path, **changes: Any) -> Options:
    options = {
        "model": MODEL,
        "weights": weights,
        "img_size": 32,
        "data": str(data),
        "methods": "pri2,noise",
        "iterations": "2",
        "seeds": "3",
        "images": 4,
        "precision": "float32",
        "threads": 1,
    }
    return Options(**{**options, **changes})


def test_the_bench_measures_what_dfq_measures(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    outcome = run(QUALITY, small(small_weights, labeled_npz), tmp_path / "results", Silent())
    row = next(r for r in outcome["rows"] if r["method"] == "pri2")
    settings = {"stages": 2, "iterations": 2, "precision": "float32", "threads": 1}
    expected = dfq.quantize(
        MODEL,
        weights=small_weights,
        img_size=32,
        bits=4,
        images=4,
        seed=3,
        settings={"inversion": settings},
        out=tmp_path / "checkpoint",
        eval=labeled_npz,
    )
    assert expected.accuracy is not None
    assert expected.agreement_on is not None
    assert row["accuracy"] == pytest.approx(expected.accuracy.quantized)
    assert row["float_accuracy"] == pytest.approx(expected.accuracy.float)
    assert row["agreement"] == pytest.approx(expected.agreement)
    assert row["kl"] == pytest.approx(expected.agreement_on.kl, rel=1e-3, abs=1e-8)
    assert row["seconds_per_image"] == pytest.approx(row["invert_seconds"] / 4)
    assert [r["iterations"] for r in outcome["rows"]] == [2, 0]


def test_the_float_model_answers_once(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    options = small(small_weights, labeled_npz, methods="noise", limit=7)
    (row,) = run(QUALITY, options, tmp_path, Silent())["rows"]
    assert row["test_images"] == 7
    (kept,) = (tmp_path / FLOATS).iterdir()
    stamp = kept.stat().st_mtime_ns
    run(QUALITY, options, tmp_path, Silent(), again=True)
    assert kept.stat().st_mtime_ns == stamp
    assert not list((tmp_path / "scratch").iterdir())


def test_more_stages_than_iterations_are_refused_before_work(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    with pytest.raises(SettingError, match="at least 7"):
        run(QUALITY, small(small_weights, labeled_npz, methods="pri7"), tmp_path, Silent())
    assert not list(tmp_path.iterdir())


def test_the_knee_is_the_least_effort_as_good_as_the_best() -> None:
    about = {
        "model": "m",
        "fingerprint": "f",
        "data": "d",
        "test_images": 100,
        "images": 32,
        "bits": 4,
        "reduce_range": True,
        "threads": 1,
        "float_accuracy": 0.95,
        "agreement": 0.9,
    }
    rows = [
        {
            **about,
            "method": "dmi",
            "iterations": t,
            "seed": s,
            "accuracy": a + 0.001 * s,
            "kl": k,
            "invert_seconds": float(t),
        }
        for t, a, k in [(10, 0.90, 0.30), (50, 0.929, 0.21), (100, 0.93, 0.20), (200, 0.92, 0.25)]
        for s in (0, 1)
    ]
    knees, sweep = quality_tables(json.loads(json.dumps(rows)))
    (knee,) = knees.rows
    assert knee["best_iterations"] == 100
    assert knee["best_accuracy"] == pytest.approx(93.05)
    assert knee["knee_iterations"] == 50
    assert knee["kl_iterations"] == 50
    assert knee["knee_seconds"] == 50
    assert [row["seeds"] for row in sweep.rows] == [2] * 4
    assert knee["verdict"] == "top-1: 3 to 0.071, above; KL: 0.1 to 0, above"


@pytest.mark.parametrize(
    ("spread", "seeds", "verdict"),
    [
        (0.01, 2, "top-1: 0.5 to 0.71, below, so chance"),
        (0.001, 2, "top-1: 0.5 to 0.071, above"),
        (0.01, 1, "top-1: needs several iterations and seeds"),
    ],
)
def test_the_summary_says_what_is_chance(spread: float, seeds: int, verdict: str) -> None:
    row = {"model": "m", "method": "dmi", "float_accuracy": 0.9, "agreement": 0.9, "kl": 0.1}
    rows = [
        {
            **row,
            "iterations": t,
            "invert_seconds": float(t),
            "accuracy": 0.9 + (0.005 if t == 20 else 0) + spread * seed,
        }
        for t in (10, 20)
        for seed in range(seeds)
    ]
    knees, _ = quality_tables(rows)
    assert knees.rows[0]["verdict"].startswith(verdict)
    accuracy, kl = quality_plots(rows)
    assert list(accuracy.curves[0].x) == [10, 20]
    assert list(kl.curves[0].y) == [0.1, 0.1]
