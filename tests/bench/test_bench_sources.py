"""Calibration sources: their images, rows and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from silent import Silent

import dfq
from calibration_bench.core import registry
from calibration_bench.core.runner import run
from calibration_bench.experiments.calibration_sources.experiment import SOURCES, Options, _settings
from calibration_bench.measure.logits import float_logits
from calibration_bench.measure.quantized import load
from calibration_bench.measure.sources import RealImages, Source, make, uniform
from dfq import LoadedModel, QuantizationSettings
from dfq.errors import DataError, SettingError

EXPERIMENT = registry.entry("calibration-sources")


def small(weights: Path, data: Path, **changes: Any) -> Options:
    options = {
        "model": "test_vit",
        "weights": weights,
        "img_size": 32,
        "data": str(data),
        "limit": 12,
        "sources": "real,noise,noise+coverage,pri2+coverage",
        "counts": "2,4",
        "iterations": 2,
        "seeds": "3",
        "precision": "float32",
        "threads": 1,
    }
    return Options(**{**options, **changes})


def key(source: str, count: int = 3, seed: int = 0) -> dict[str, Any]:
    about = {"precision": "float32", "threads": 1, "iterations": 2, "bits": 8, "reduce_range": True}
    return {**about, "source": source, "images": count, "seed": seed}


def test_every_source_count_and_width_is_a_row(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    options = small(small_weights, labeled_npz)
    outcome = run(EXPERIMENT, options, tmp_path, Silent())
    rows = outcome["rows"]
    assert len(rows) == 4 * 2 * 2
    assert {row["test_images"] for row in rows} == {12}
    drawn = {(row["images"], row["real"]) for row in rows if row["source"] == "real"}
    assert len(drawn) == 2
    assert all(name.startswith("images.npz ") for _, name in drawn)
    assert str(tmp_path.parent) not in (tmp_path / "calibration-sources.json").read_text()
    by = {(r["source"], r["images"], r["bits"]): r for r in rows}
    assert by["noise", 4, 8]["dataset_bytes"] == by["noise+coverage", 4, 8]["dataset_bytes"]
    assert by["noise", 4, 4]["kl"] != by["noise+coverage", 4, 4]["kl"]
    assert by["pri2+coverage", 4, 8]["dataset_bytes"] < by["noise", 4, 8]["dataset_bytes"]
    pivot, table = outcome["tables"][:2]
    assert len(pivot["rows"]) == 4
    assert set(pivot["columns"]) == {"source", "kl_2", "kl_4"}
    assert len(table["rows"]) == 8
    assert "pri2+coverage, T = 2" in {row["source"] for row in table["rows"]}


def test_a_row_is_what_dfq_measures(tmp_path: Path, small_weights: Path, labeled_npz: Path) -> None:
    options = small(small_weights, labeled_npz, sources="pri2+coverage", counts="4", limit=None)
    row = next(r for r in run(EXPERIMENT, options, tmp_path, Silent())["rows"] if r["bits"] == 4)
    expected = dfq.quantize(
        "test_vit",
        weights=small_weights,
        img_size=32,
        bits=4,
        images=4,
        seed=3,
        settings={
            "inversion": {"stages": 2, "iterations": 2, "precision": "float32", "threads": 1}
        },
        out=tmp_path / "checkpoint",
        eval=labeled_npz,
    )
    assert expected.agreement_on is not None
    assert row["agreement"] == pytest.approx(expected.agreement)
    assert row["kl"] == pytest.approx(expected.agreement_on.kl, rel=1e-3, abs=1e-8)


def test_sources_differ_from_the_default_in_coverage_alone() -> None:
    assert _settings(key("pri4+coverage")) == QuantizationSettings(bits=8)
    assert _settings(key("real")) == QuantizationSettings(bits=8, smooth=(), fractal=0)
    assert {Source(name).base for name in SOURCES.split(",")} == {
        "real", "noise", "uniform", "fractal", "dmi", "smi", "pri2", "pri4", "pri7",
    }  # fmt: skip


@pytest.mark.parametrize("source", ["real", "noise", "uniform", "fractal", "pri2"])
def test_the_same_seed_gives_the_same_images(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, source: str
) -> None:
    options = small(small_weights, labeled_npz)
    loaded, _ = load(options)
    real = RealImages(loaded, None, options.data, options.limit)
    made = [
        make(options, loaded, real, key(source, seed=seed), tmp_path / name)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    images = [
        torch.cat([b.patches for b in dfq.SparseImageDataset(m.path).batches(9)]) for m in made
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert [m.bytes for m in made] == [dfq.SparseImageDataset(m.path).bytes for m in made]


def test_real_images_are_not_those_of_the_test(small_weights: Path, labeled_npz: Path) -> None:
    loaded, tested = load(small(small_weights, labeled_npz))
    real = RealImages(loaded, None, str(labeled_npz), 12)
    assert len(real) == 8
    sample = real.sample(8, 0)
    known = {pixels.transpose(2, 0, 1).tobytes() for pixels in tested.pixels}
    from dfq.sparse import unpatchify

    whole = unpatchify(sample.patches, sample.positions, loaded.vit.arch.grid)
    assert len({image.numpy().tobytes() for image in whole}) == 8
    assert not known & {image.numpy().tobytes() for image in whole}
    with pytest.raises(DataError, match="9 real images"):
        real.need(9)


def test_too_few_real_images_are_refused_before_work(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    with pytest.raises(DataError, match="--limit"):
        run(EXPERIMENT, small(small_weights, labeled_npz, counts="9"), tmp_path, Silent())
    assert not list(tmp_path.iterdir())


def test_uniform_images_have_one_color(loaded: LoadedModel) -> None:
    images = uniform(4, loaded.vit.arch.grid, 0).patches.numpy()
    channels = images.reshape(4, 16, 3, 16)
    assert np.ptp(channels, axis=(1, 3)).max() == 0
    assert len(np.unique(channels[:, 0, :, 0])) > 6


def test_other_images_under_the_same_name_are_another_row(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    rows = []
    for level in (0, 200):
        place = tmp_path / str(level) / "real.npz"
        place.parent.mkdir()
        np.savez(place, x=np.full((4, 32, 32, 3), level, dtype=np.uint8))
        changes: dict[str, Any] = {"sources": "real", "counts": "2", "bits": "8"}
        options = small(small_weights, labeled_npz, real=str(place), **changes)
        rows += run(EXPERIMENT, options, tmp_path / "results", Silent())["rows"]
    assert rows[0]["real"] != rows[1]["real"]
    assert rows[0]["kl"] != rows[1]["kl"]


def test_test_images_are_refused_as_real(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    options = small(small_weights, labeled_npz, sources="real", real=str(labeled_npz))
    with pytest.raises(DataError, match="holds images of"):
        run(EXPERIMENT, options, tmp_path, Silent())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "foo"}, "precision is 'foo'"),
        ({"threads": 0}, "--threads is 0"),
        ({"threads": -1}, "--threads is -1"),
        ({"sources": "pri400", "iterations": 24}, "400"),
    ],
    ids=str,
)
def test_mistakes_are_refused_before_work(
    tmp_path: Path, small_weights: Path, labeled_npz: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        run(EXPERIMENT, small(small_weights, labeled_npz, **changes), tmp_path, Silent())
    assert not list(tmp_path.iterdir())


def test_damaged_float_logits_are_computed_anew(
    tmp_path: Path, small_weights: Path, labeled_npz: Path
) -> None:
    loaded, data = load(small(small_weights, labeled_npz))
    whole = float_logits(loaded, data, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(float_logits(loaded, data, tmp_path), whole)
    assert torch.equal(float_logits(loaded, data, tmp_path), whole)


def test_unknown_sources_are_refused() -> None:
    with pytest.raises(SettingError, match="Did you mean 'fractal'"):
        Source("fractl")
