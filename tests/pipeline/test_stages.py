"""The stages of ``quantize``, called alone."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from api_calls import FAST, quantize
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.errors import DatasetError, SettingError
from dfq.pipeline import stages
from dfq.pipeline.stages import Plan
from dfq.quantization import Calibration
from dfq.quantization.layers import IntegerLinear
from dfq.results.values import QuantizeResult
from dfq.sparse import pixels_to_input

IMAGES = {**FAST, "images": 4}


def prepare(model: Any, **quantization: Any) -> Plan:
    return stages.prepare(model, settings={"inversion": IMAGES, "quantization": quantization})


def run(plan: Plan, out: Path, source: Path | None = None) -> QuantizeResult:
    """Run all stages except the measurement."""
    images = stages.make_calibration_set(plan, source)
    quantized = stages.round_weights(plan, stages.calibrate(plan, images))
    quantized = stages.reconstruct(plan, quantized, images)
    return stages.save(plan, stages.diagnose(plan, quantized, images), images, out)


def content(checkpoint: Path) -> dict[str, bytes]:
    paths = [p for p in checkpoint.iterdir() if p.name != "report.json"]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    "settings",
    [{"bits": 8}, {"bits": 4, "attention": "int8"}, {"bits": 4, "reconstruct": 2, "equalize": 0.0}],
    ids=str,
)
def test_stages_one_by_one_give_the_checkpoint_of_quantize(
    settings: dict[str, Any], tmp_path: Path, tiny: VisionTransformer
) -> None:
    whole = quantize(
        tiny, tmp_path / "whole", settings={"inversion": IMAGES, "quantization": settings}
    )
    plan = prepare(tiny, **settings)
    saved = run(plan, tmp_path / "stages")
    assert content(tmp_path / "stages") == content(tmp_path / "whole")
    assert (saved.agreement, saved.agreement_on) == (None, None)
    measured = stages.measure(plan, dfq.load(tmp_path / "stages", runtime="torch"))
    result = stages.report(plan, saved, measured)
    same = {"seconds": whole.seconds, "checkpoint": whole.checkpoint, "calibration": None}
    assert dataclasses.replace(result, **same) == dataclasses.replace(whole, calibration=None)  # type: ignore[arg-type]
    report = json.loads((tmp_path / "stages" / "report.json").read_text())
    assert report["agreement"] == whole.agreement


def test_the_default_place_is_that_of_quantize(
    tmp_path: Path, tiny: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = prepare(tiny, bits=4)
    images = stages.make_calibration_set(plan)
    quantized = stages.round_weights(plan, stages.calibrate(plan, images))
    assert stages.save(plan, quantized, images).checkpoint == "VisionTransformer-w4a8"
    assert (tmp_path / "VisionTransformer-w4a8" / "config.json").is_file()


def test_stages_are_fitted_unless_they_are_set(tiny: VisionTransformer) -> None:
    few = {"iterations": 2, "threads": 1}
    assert stages.prepare(tiny, settings={"inversion": few}).recipe.inversion.stages == 2
    four = {**few, "stages": 4}
    assert stages.prepare(tiny, settings={"inversion": four}).recipe.inversion.stages == 4


def test_ranges_are_those_of_images_of_ones_own(tmp_path: Path, tiny: VisionTransformer) -> None:
    plan = prepare(tiny, smooth=(), fractal=0)
    grid = plan.model.vit.arch.grid
    noise = dfq.fractal_noise(3, grid)
    dfq.write_dataset(tmp_path / "images", [[noise]], plan.model, origin="own")
    images = stages.make_calibration_set(plan, tmp_path / "images")
    assert (images.source.method, images.source.images) == ("own", 3)
    statistics = stages.calibrate(plan, images).statistics["blocks.0.mlp.fc1"]
    inputs: list[torch.Tensor] = []
    layer = plan.model.vit.block(0).mlp.fc1
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    pixels = pixels_to_input(noise.patches, plan.model.preprocessing, grid)
    plan.model.vit.tokens(pixels, noise.positions)
    torch.testing.assert_close(statistics.low, inputs[0].amin(0))
    torch.testing.assert_close(statistics.high, inputs[0].amax(0))


def test_ranges_of_ones_own_are_the_quantized_models(tiny: VisionTransformer) -> None:
    plan = prepare(tiny, equalize=0.0)
    images = stages.make_calibration_set(plan)
    calibration = stages.calibrate(plan, images)
    name = "blocks.1.attn.proj"
    wide = dataclasses.replace(calibration.qparams[name], scale=2 * calibration.qparams[name].scale)
    changed = dataclasses.replace(calibration, qparams={**calibration.qparams, name: wide})
    layer = stages.round_weights(plan, changed).model.get_submodule(name)
    assert isinstance(layer, IntegerLinear)
    assert layer.input_qparams == wide


def test_a_checkpoint_that_was_loaded_is_measured(
    tmp_path: Path, tiny: VisionTransformer, labeled_npz: Path
) -> None:
    whole = quantize(tiny, tmp_path / "out", eval=labeled_npz)
    plan = prepare(tiny)
    data = stages.make_evaluation_set(plan, labeled_npz)
    measured = stages.measure(plan, dfq.load(tmp_path / "out", runtime="torch"), data)
    assert measured.agreement_on == whole.agreement_on
    assert (measured.accuracy, measured.class_order) == (whole.accuracy, "y")
    assert measured.agreement_outside is None


def without(calibration: Calibration, **parts: str) -> Calibration:
    """A calibration without an entry of each named part."""
    changed: dict[str, Any] = {
        part: {k: v for k, v in getattr(calibration, part).items() if k != name}
        for part, name in parts.items()
    }
    return dataclasses.replace(calibration, **changed)


def test_a_calibration_that_lacks_something_is_refused(tiny: VisionTransformer) -> None:
    plan, nearest = prepare(tiny, bits=4), prepare(tiny, bits=4, rounding="nearest")
    whole = stages.calibrate(plan, stages.make_calibration_set(plan))
    first = "blocks.0.attn.qkv"
    with pytest.raises(SettingError, match=f"no range of '{first}'"):
        stages.round_weights(plan, without(whole, qparams=first))
    with pytest.raises(SettingError, match=f"no statistics of '{first}'"):
        stages.round_weights(plan, without(whole, statistics=first))
    first_moments = stages.calibrate(nearest, stages.make_calibration_set(nearest))
    with pytest.raises(SettingError, match="no second moment"):
        stages.round_weights(plan, first_moments)
    wider = prepare(make_vit(embed_dim=96))
    with pytest.raises(SettingError, match=r"of 64 features .* the model has 96"):
        stages.round_weights(wider, whole)


def test_images_of_another_grid_are_refused(tiny: VisionTransformer) -> None:
    images = stages.make_calibration_set(prepare(tiny))
    with pytest.raises(DatasetError, match="have a grid of"):
        stages.calibrate(prepare(make_vit(patch_size=8)), images)


def test_every_stage_checks_its_arguments(tiny: VisionTransformer) -> None:
    functions = [f for n in stages.__all__ if inspect.isfunction(f := getattr(stages, n))]
    assert len(functions) == 10
    assert all(hasattr(function, "__wrapped__") for function in functions)
    plan: Any = prepare(tiny)
    with pytest.raises(SettingError, match=r"images is None, of type NoneType; it takes Calib"):
        stages.calibrate(plan, None)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"plan is 'demo', of type str; it takes Plan"):
        stages.measure("demo", plan)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'imgsize'.*'img_size'"):
        stages.prepare(tiny, imgsize=16)  # type: ignore[call-arg]


# ---- measuring left out


def test_measuring_can_be_left_out(tmp_path: Path, tiny: VisionTransformer) -> None:
    cache = tmp_path / "cache"
    result = quantize(tiny, tmp_path / "out", evaluate=False, cache=cache)
    measured = quantize(tiny, tmp_path / "measured", cache=cache)
    assert content(tmp_path / "out") == content(tmp_path / "measured")
    assert (result.agreement, result.agreement_on, result.agreement_outside) == (None, None, None)
    assert (result.accuracy, result.gate) == (None, [])
    assert result.layers == measured.layers
    assert result.seconds.evaluate == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["agreement_on"] is None


def test_nothing_is_inverted_to_measure_on(tmp_path: Path, tiny: VisionTransformer) -> None:
    quantize(tiny, tmp_path / "out", evaluate=False, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "datasets").iterdir())) == 1


def test_the_table_says_that_nothing_was_measured(tmp_path: Path, tiny: VisionTransformer) -> None:
    result = quantize(tiny, tmp_path / "out", evaluate=False)
    assert "not measured" in repr(result)
    assert "not measured" not in repr(quantize(tiny, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "value"), [("eval", "demo"), ("min_agreement", 0.5), ("min_accuracy", 0.5)]
)
def test_what_needs_measuring_contradicts_leaving_it_out(
    name: str, value: Any, tmp_path: Path, tiny: VisionTransformer
) -> None:
    with pytest.raises(SettingError, match=f"{name} .*evaluate=False"):
        quantize(tiny, tmp_path / "out", evaluate=False, **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["dataset", "noise"])
@pytest.mark.parametrize("evaluate", [True, False])
def test_classes_that_the_model_lacks_are_found_before_any_work(
    source: str, evaluate: bool, tmp_path: Path, tiny: VisionTransformer
) -> None:
    path = tmp_path / "dataset"
    if source == "dataset":
        dfq.invert(tiny, images=4, settings={"iterations": 1}, out=path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(SettingError, match="classes has 99"):
        dfq.quantize(
            tiny,
            calibration=path if source == "dataset" else "noise",
            settings={"inversion": {"classes": (99,)}},
            evaluate=evaluate,
            out=tmp_path / "out",
            cache=tmp_path / "cache",
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_classes_of_students_images_are_checked_beside_data_too(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    dfq.invert(tiny, images=4, settings={"iterations": 1}, out=tmp_path / "dataset")
    with pytest.raises(SettingError, match="classes has 99"):
        dfq.distill(
            tiny,
            student="vit_tiny_patch16_224",
            data=tmp_path / "dataset",
            steps=1,
            settings={"inversion": {"classes": (99,)}},
            out=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
