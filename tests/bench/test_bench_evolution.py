"""Recording of trajectories, and features of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from silent import Silent

from calibration_bench.core import registry
from calibration_bench.core.report import report
from calibration_bench.core.runner import run
from calibration_bench.experiments.evolution.experiment import PICTURES, Options, _cosines
from calibration_bench.measure.features import ClassMeans, block_features, confidence, filled
from calibration_bench.measure.logits import LabeledImages
from calibration_bench.measure.ours import unit_images
from calibration_bench.measure.sources import dense
from calibration_bench.measure.watching import Recorder, draw_attention, kept_share
from dfq import InversionSettings, LoadedModel
from dfq.errors import SettingError
from dfq.inversion import plan_units
from dfq.sparse import patchify

EXPERIMENT = registry.entry("evolution")


def small(weights: Path, data: Path, **changes: Any) -> Options:
    options = {
        "model": "test_vit",
        "weights": weights,
        "img_size": 32,
        "data": str(data),
        "methods": "pri2,pri-random,dmi",
        "stages": 2,
        "trajectories": 3,
        "iterations": 4,
        "seeds": "0,1",
        "precision": "float32",
        "threads": 1,
    }
    return Options(**{**options, **changes})


def test_runs_of_other_stages_are_rows_of_their_own(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    for stages in (4, 2):
        options = small(small_weights, labeled_npz, methods="pri-random", stages=stages, seeds="0")
        run(EXPERIMENT, options, tmp_path, Silent())
    tables = report(tmp_path, None)
    for stages in (2, 4):
        assert f"| pri-random, v = {stages}, T = 4 | 1 of {stages} | 3 | 1 |" in tables
    assert len(list((tmp_path / PICTURES).iterdir())) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 0, "methods": "pri4"}, "--stages is 0"),
        ({"methods": "noise"}, "names 'noise'"),
        ({"precision": "foo"}, "precision is 'foo'"),
        ({"threads": -1}, "--threads is -1"),
        ({"methods": "pri-early", "stages": 4}, "iterations"),
    ],
    ids=str,
)
def test_further_mistakes_are_refused_before_work(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        run(EXPERIMENT, small(small_weights, labeled_npz, **changes), tmp_path, Silent())
    assert not list(tmp_path.iterdir())


def test_every_stage_is_described(tmp_path: Path, small_weights: Path, labeled_npz: Path) -> None:
    outcome = run(EXPERIMENT, small(small_weights, labeled_npz), tmp_path, Silent())
    rows = {(r["source"], r["seed"]): r for r in outcome["rows"]}
    assert set(rows) == {
        ("real", 0),
        *((s, i) for s in ("pri2", "pri-random", "dmi") for i in (0, 1)),
    }
    pri = rows["pri2", 1]
    assert [s["stage"] for s in pri["stages"]] == [1, 2]
    assert [s["images"] for s in pri["stages"]] == [3, 3]
    assert len(pri["losses"]) == 4
    assert pri["live"] == [4, 4, 2, 2]
    assert pri["stages"][0]["attention"] >= 1
    assert pri["stages"][1]["attention"] is None
    assert len(pri["stages"][0]["own"]) == 6
    dmi = rows["dmi", 0]["stages"][0]
    assert dmi["filled_confidence"] == pytest.approx(dmi["confidence"], abs=1e-5)
    by_stage, cosines, margins, losses = outcome["tables"]
    assert rows["pri-random", 0]["stages"][0]["attention"] is None
    two = ["1 of 2", "2 of 2"]
    assert [r["stage"] for r in by_stage["rows"]] == [None, *two, *two, None]
    assert {r["seeds"] for r in losses["rows"]} == {2}
    last = by_stage["rows"][1]
    assert margins["rows"][1]["block_6"] == pytest.approx(last["margin"])
    assert cosines["rows"][1]["block_6"] == pytest.approx(last["own"])
    for name in pri["pictures"]:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    assert len(list((tmp_path / PICTURES).iterdir())) == 8
    plots = EXPERIMENT.load().plots(outcome["rows"])
    assert [len(plot.curves) for plot in plots] == [3, 6]


def test_recording_changes_nothing_and_sees_every_iteration(loaded: LoadedModel) -> None:
    settings = InversionSettings(
        iterations=8, images=8, unit_size=2, precision="float32", threads=1
    )
    (unit,) = plan_units(settings, 16)
    recorder = Recorder(2)
    watched = unit_images(loaded, settings, unit, recorder)
    alone = unit_images(loaded, settings, unit)
    assert all(torch.equal(a.patches, b.patches) for a, b in zip(watched, alone, strict=True))
    assert recorder.live == [16, 16, 12, 12, 8, 8, 4, 4]
    assert recorder.losses[1] < recorder.losses[0]


def test_the_share_of_kept_patches_is_one_by_chance() -> None:
    importance = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    assert kept_share(importance, torch.tensor([[3]])) == pytest.approx(2.0)
    assert kept_share(importance, torch.tensor([[0, 1, 2, 3]])) == pytest.approx(1.0)


def test_attention_is_drawn_where_patches_are(tmp_path: Path, loaded: LoadedModel) -> None:
    importance = torch.tensor([[1.0, 0.25]])
    ranking = (importance, torch.tensor([[0, 15]]), torch.tensor([[0]]))
    path = draw_attention([ranking], loaded.vit.arch.grid, tmp_path / "map.png")
    picture = np.asarray(Image.open(path))
    corners = picture[10, 10], picture[-10, -10], picture[10, -10]
    assert corners[0].tolist() == [255, 150, 40]
    assert corners[1].tolist() == [75, 100, 127]
    assert len(set(corners[2].tolist())) == 1


def data() -> LabeledImages:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    return LabeledImages("d", pixels, np.array([0, 0, 1, 1, 4, 4]))


def test_an_image_that_is_its_classs_mean_has_cosine_one(loaded: LoadedModel) -> None:
    means = ClassMeans(loaded, data(), range(0, 6, 2))
    own, others = means.cosines(means.means[:, :2], torch.tensor([0, 1]))
    assert own.tolist() == pytest.approx([1, 1])
    assert (others < 1).all()
    nothing, _ = means.cosines(means.means[:, :1], torch.tensor([2]))
    assert nothing.isnan().all()
    assert _cosines(means, means.means[:, :1], torch.tensor([2])) == {
        "own": [None, None],
        "others": [None, None],
    }


def test_features_are_those_of_the_models_own_forward(loaded: LoadedModel) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = block_features(loaded.vit, patchify(x, loaded.vit.arch.grid))
    assert features.shape == (2, 2, 64)
    with torch.no_grad():
        logits = loaded.vit.classify(features[-1][:, None])
        assert torch.allclose(logits, loaded.vit(x), atol=1e-5)


def test_a_whole_image_has_nothing_to_fill(loaded: LoadedModel) -> None:
    grid = loaded.vit.arch.grid
    patches = torch.randint(0, 256, (2, 16, 48), generator=torch.Generator().manual_seed(0))
    images = dense(patches.to(torch.uint8), grid)
    from calibration_bench.measure.features import network_input

    with torch.no_grad():
        own = loaded.vit.forward_sparse(network_input(loaded, images), images.positions)
    assert torch.allclose(filled(loaded, images), own, atol=1e-5)
    sure = confidence(torch.tensor([[100.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    assert sure == {"confidence": 0.75, "top1": 0.5}


def test_too_few_iterations_are_refused_before_work(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    with pytest.raises(SettingError, match="at least 2"):
        run(EXPERIMENT, small(small_weights, labeled_npz, iterations=1), tmp_path, Silent())
