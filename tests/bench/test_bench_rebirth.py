"""Variants of the ablation of re-birth: equal patch updates, settings, table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from silent import Silent

from calibration_bench.core import registry
from calibration_bench.core.registry import Bench
from calibration_bench.core.runner import run
from calibration_bench.experiments.rebirth.experiment import Options, _settings
from calibration_bench.experiments.rebirth.tables import rebirth_tables
from calibration_bench.measure.methods import patch_updates, stages
from calibration_bench.measure.variants import RERANKINGS, VARIANTS, equal_iterations
from dfq import InversionSettings
from dfq.errors import SettingError
from dfq.inversion import events

EXPERIMENT = registry.entry("rebirth")
KEY = {"images": 32, "precision": "float32", "threads": 1, "stages": 4}


def variant(name: str, iterations: int) -> InversionSettings:
    return _settings(KEY, name, iterations, 0)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("patches", [196, 256])
def test_variants_make_the_same_images_from_as_many_updates(name: str, patches: int) -> None:
    budget = patch_updates(variant("pri", 64), patches)
    iterations = equal_iterations(lambda t: variant(name, t), patches, budget, 4)
    assert patch_updates(variant(name, iterations), patches) == pytest.approx(budget, rel=0.05)
    assert variant(name, iterations).images == 32


@pytest.mark.parametrize("v", [2, 4, 7])
@pytest.mark.parametrize("name", ["pri-early", "pri-late", "dmi-snapshots"])
def test_the_least_effort_leaves_every_stage_an_iteration(name: str, v: int) -> None:
    key = {**KEY, "stages": v, "images": v}
    iterations = equal_iterations(lambda t: _settings(key, name, t, 0), 196, 1, v)
    kept = [e.iteration for e in events(_settings(key, name, iterations, 0), 196)]
    assert len(kept) == v
    with pytest.raises(SettingError):
        events(_settings(key, name, iterations - 1, 0), 196)


def test_updates_are_counted_over_whole_trajectories() -> None:
    pri = InversionSettings(stages=2, iterations=10, images=3)
    assert patch_updates(pri, 16) == 2 * (5 * 16 + 5 * 8)
    shots = InversionSettings(method="dmi", snapshots=2, iterations=10, images=2)
    assert patch_updates(shots, 16) == 10 * 16
    assert [s.live for s in stages(shots, 16)] == [16, 16]


def test_what_is_left_of_the_reranked_control_is_an_image_of_pri() -> None:
    schedule = events(variant("smi-reranked", 26), 196)
    assert len(schedule) == RERANKINGS + 1
    assert [e.iteration for e in schedule] == list(range(2, 27, 2))
    assert schedule[-1].count == pytest.approx(49, abs=3)


def test_schedules_are_early_and_late() -> None:
    early, even, late = (
        [e.iteration for e in events(variant(name, 64), 196)]
        for name in ("pri-early", "pri", "pri-late")
    )
    assert even == [16, 32, 48, 64]
    assert all(a < b < c for a, b, c in zip(early[:3], even[:3], late[:3], strict=True))


def test_a_run_has_every_variant(tmp_path: Path, small_weights: Path, labeled_npz: Path) -> None:
    options: dict[str, Any] = {
        "model": "test_vit",
        "weights": small_weights,
        "img_size": 32,
        "data": str(labeled_npz),
        "images": 4,
        "stages": 2,
        "iterations": 8,
        "seeds": "0",
        "precision": "float32",
        "threads": 1,
        "limit": None,
    }
    outcome = run(EXPERIMENT, Options(**options), tmp_path, Silent())
    rows = outcome["rows"]
    assert [r["variant"] for r in rows] == list(VARIANTS)
    both = EXPERIMENT.load().plan(Options(**{**options, "seeds": "0,1"}), Bench(tmp_path, Silent()))
    assert [(k["seed"], k["variant"]) for k in both] == [(s, v) for s in (0, 1) for v in VARIANTS]
    by = {r["variant"]: r for r in rows}
    assert by["pri"]["patch_updates"] == by["pri"]["budget"] == by["pri-least"]["patch_updates"]
    assert by["dmi"]["trajectories"] == 4
    assert by["dmi-snapshots"]["trajectories"] == 2
    assert by["dmi"]["patches_kept"] == 2 * by["pri"]["patches_kept"]
    assert (by["pri"]["first_kept_at"], by["pri"]["last_kept_at"]) == (4, 8)
    (table,) = outcome["tables"]
    assert [r["variant"] for r in table["rows"]] == list(VARIANTS)
    assert table["rows"][0]["against"] is None


def test_differences_are_taken_seed_by_seed() -> None:
    about = {
        "model": "m", "fingerprint": "f", "data": "d", "test_images": 9, "images": 4, "stages": 4,
        "bits": 4, "reduce_range": True, "coverage": False, "budget": 100, "float_accuracy": 0.9,
        "trajectories": 1,
        "patches_kept": 16, "patch_updates": 100, "first_kept_at": 1, "last_kept_at": 4,
        "iterations": 4, "accuracy": 0.9, "agreement": 1.0, "invert_seconds": 1.0,
    }  # fmt: skip
    rows = [
        {**about, "variant": name, "seed": seed, "kl": kl}
        for name, kls in {"pri": (0.25, 0.5), "dmi": (0.5, 1.0)}.items()
        for seed, kl in enumerate(kls)
    ]
    (table,) = rebirth_tables(rows)
    assert table.rows[1]["against"] == "+0.38 ± 0.18"
    assert table.rows[1]["kept_at"] == "1 to 4"
