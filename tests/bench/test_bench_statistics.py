"""Similarity of images, rankings and activations, and its experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from silent import Silent

from calibration_bench.core import registry
from calibration_bench.core.runner import run
from calibration_bench.experiments.image_statistics.experiment import Options
from calibration_bench.experiments.image_statistics.tables import statistics_tables
from calibration_bench.measure.similarity import (
    distances,
    input_moments,
    psnr,
    ranks,
    spearman,
    ssim,
)
from dfq import LoadedModel
from dfq.errors import SettingError
from dfq.sparse import patchify

EXPERIMENT = registry.entry("image-statistics")
PATCHES = torch.randint(0, 256, (5, 7, 48), generator=torch.Generator().manual_seed(0))


def test_equal_pictures_have_no_finite_psnr() -> None:
    assert psnr(PATCHES, PATCHES) is None
    assert psnr(PATCHES, PATCHES + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr(torch.zeros(4), torch.full((4,), 255)) == pytest.approx(0)


def test_ssim_is_one_for_equal_patches_and_less_for_others() -> None:
    assert ssim(PATCHES, PATCHES) == pytest.approx(1)
    assert ssim(PATCHES, 255 - PATCHES) < 0
    noise = torch.randint(-20, 21, PATCHES.shape, generator=torch.Generator().manual_seed(0))
    noisy = PATCHES + noise
    assert ssim(PATCHES, PATCHES.flip(0)) < ssim(PATCHES, noisy) < 1


def test_equal_values_share_their_mean_rank() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_rank_correlation_of_known_rankings() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(a, a) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(0.8)
    assert spearman(a, torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0])) == pytest.approx(0.866, abs=1e-3)
    assert spearman(a, torch.ones(5)) is None


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=30))
@settings(deadline=None, derandomize=True)
def test_rank_correlation_sees_the_order_alone(values: list[int]) -> None:
    a = torch.tensor(values, dtype=torch.float64)
    b = torch.arange(len(values))
    actual = spearman(a, b)
    assert actual == pytest.approx(spearman(a.exp(), b)) if actual is not None else True
    if len(set(values)) > 1:
        assert spearman(a, a) == pytest.approx(1)


def patches(loaded: LoadedModel, seed: int) -> torch.Tensor:
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return patchify(x, loaded.vit.arch.grid)


def test_moments_are_those_of_all_inputs_at_once(loaded: LoadedModel) -> None:
    x = patches(loaded, 0)
    actual = input_moments(loaded.vit, [(x[:2], None), (x[2:], None)])
    assert set(actual) == {
        f"{block}.{layer}"
        for block in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    with torch.no_grad():
        tokens = loaded.vit.block(0).norm1(loaded.vit.embed(x)).flatten(0, 1).double()
    first = actual["0.attn.qkv"]
    assert first.count == 6 * 17
    assert torch.allclose(first.mean, tokens.mean(0), atol=1e-6)
    assert torch.allclose(first.variance, tokens.var(0, correction=0), atol=1e-6)
    assert torch.equal(first.high, tokens.amax(0))


def test_statistics_are_at_no_distance_from_themselves(loaded: LoadedModel) -> None:
    same = input_moments(loaded.vit, [(patches(loaded, 0), None)])["1.mlp.fc2"]
    far = input_moments(loaded.vit, [(3 * patches(loaded, 1) + 1, None)])["1.mlp.fc2"]
    assert distances(same, same) == pytest.approx(
        {"mean": 0, "variance": 0, "range": 0, "outside": 0}
    )
    assert all(value > 0 for value in distances(far, same).values())


def small(weights: Path, data: Path, **changes: Any) -> Options:
    options = {
        "model": "test_vit",
        "weights": weights,
        "img_size": 32,
        "data": str(data),
        "methods": "pri2",
        "trajectories": 3,
        "snapshots": 2,
        "sources": "real,noise,pri2",
        "images": 4,
        "iterations": 4,
        "seeds": "0,1",
        "limit": 12,
        "precision": "float32",
        "threads": 1,
    }
    return Options(**{**options, **changes})


def test_a_run_has_all_three_kinds(tmp_path: Path, small_weights: Path, labeled_npz: Path) -> None:
    outcome = run(EXPERIMENT, small(small_weights, labeled_npz), tmp_path, Silent())
    rows = outcome["rows"]
    kinds = [row["kind"] for row in rows]
    assert [kinds.count(k) for k in ("fidelity", "ranking", "activations")] == [2, 2, 6]
    first, second = rows[0]["stages"]
    assert first["identical"]
    assert first["psnr_then"] is None
    assert first["ssim_then"] == pytest.approx(1)
    assert not second["identical"]
    assert second["psnr_then"] == pytest.approx(second["psnr_end"])
    ranking = next(row for row in rows if row["kind"] == "ranking")
    assert ranking["over_time"][-1] == pytest.approx(1)
    fidelity, activations, rankings = outcome["tables"]
    assert fidelity["rows"][0]["psnr_then"] == "identical"
    assert {r["source"] for r in activations["rows"]} == {"real", "noise", "pri2, T = 4"}
    assert len(rankings["rows"]) == 1 + 6 + 2


def test_identical_rankings_are_stable() -> None:
    about = {
        "model": "m", "fingerprint": "f", "data": "d", "test_images": 9, "precision": "float32",
        "threads": 1, "kind": "ranking", "source": "dmi", "iterations": 4, "trajectories": 2,
        "snapshots": 2, "over_time": [0.5, 1.0], "measures": {"attention, gradient": None},
        "labels": [0, 1], "attention": [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]],
    }  # fmt: skip
    rows = [{**about, "seed": seed} for seed in (0, 1)]
    table = statistics_tables(rows)[2]
    values = {row["pair"]: row["value"] for row in table.rows}
    assert values["attention of two seeds, same class"] == pytest.approx(1)
    assert values["attention of two seeds, other classes"] == pytest.approx(-1)
    assert values["attention after 2 iterations, after 4"] == 0.5
    assert values["by attention, gradient"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "dmi"}, "give variants of PRI alone"),
        ({"sources": "noise+coverage"}, "leave .coverage out"),
        ({"iterations": 1}, "at least 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, changes: Any, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        run(EXPERIMENT, small(small_weights, labeled_npz, **changes), tmp_path, Silent())
