"""``quantize`` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_calls import FAST, hopeless, quantize
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.errors import DataError, SettingError
from dfq.results.values import QuantizeResult


@torch.no_grad()
def test_a_module_in_memory_becomes_a_checkpoint(
    api_model: VisionTransformer, api_checkpoint: Path
) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = api_model(images)
    actual = dfq.load(api_checkpoint)(images)
    assert float((actual - exact).norm() / (exact - exact.mean(0)).norm()) < 0.3


def test_the_module_is_left_as_it_is(tmp_path: Path) -> None:
    model = make_vit(init_values=0.3).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = {k: p.requires_grad for k, p in model.named_parameters()}
    quantize(model, tmp_path / "out", bits=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: p.requires_grad for k, p in model.named_parameters()} == gradients
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_callers_threads_are_left_alone(tiny: VisionTransformer) -> None:
    threads = torch.get_num_threads()
    dfq.invert(tiny, images=2, settings={**FAST, "threads": threads + 1})
    assert torch.get_num_threads() == threads


def test_the_result_says_what_was_done(tmp_path: Path, tiny: VisionTransformer) -> None:
    result = quantize(tiny, tmp_path / "out", bits=4, attention="int8", cache=tmp_path / "cache")
    assert (result.scheme, result.attention) == ("w4a8", "int8")
    assert result.checkpoint == str(tmp_path / "out")
    assert (result.calibration.method, result.calibration.images) == ("pri", 4)
    assert Path(result.calibration.path).is_relative_to(tmp_path / "cache")


def test_a_result_is_called_as_an_inverted_dataset_is(tmp_path: Path, tiny: Any) -> None:
    tiny.pretrained_cfg = {"architecture": "my_vit"}
    inverted = dfq.invert(tiny, images=2, settings=FAST)
    assert quantize(tiny, tmp_path / "out").model == inverted.model


def test_sizes_are_those_of_the_parameters_and_the_file(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    result = quantize(tiny, tmp_path / "out")
    parameters = sum(p.numel() for p in dfq.load_model(tiny).vit.parameters())
    assert result.bytes.float == 4 * parameters
    assert result.bytes.quantized == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_without_data_agreement_is_measured_on_fresh_images(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    result = quantize(tiny, tmp_path / "out")
    assert result.agreement is not None
    assert result.agreement_on is not None
    assert result.agreement_on.data == "inverted"
    assert (result.accuracy, result.accuracy_top5) == (None, None)


def test_with_data_accuracy_is_measured_too(
    tmp_path: Path, tiny: VisionTransformer, labeled_npz: Path
) -> None:
    result = quantize(tiny, tmp_path / "out", eval=labeled_npz)
    assert result.accuracy is not None
    assert result.agreement_on is not None
    assert result.agreement_on.data == str(labeled_npz)
    assert result.agreement_on.images == 20


def test_float_accuracy_is_that_of_the_module(
    tmp_path: Path, tiny: VisionTransformer, labeled_npz: Path
) -> None:
    result = quantize(tiny, tmp_path / "out", eval=labeled_npz, mean=(0.5,) * 3, std=(0.25,) * 3)
    data = np.load(labeled_npz)
    images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2) / 255
    right = tiny((images - 0.5) / 0.25).argmax(-1) == torch.from_numpy(data["y"])
    assert result.accuracy is not None
    assert result.accuracy.float == pytest.approx(float(right.float().mean()))


def test_a_backbone_without_classes_is_inverted_and_compared_by_its_features(
    tmp_path: Path,
) -> None:
    result = quantize(make_vit(num_classes=0), tmp_path / "out")
    assert result.agreement_on is not None
    assert (result.agreement_on.data, result.agreement_on.metric) == ("inverted", "cosine")
    assert result.agreement is not None
    assert 0.9 < result.agreement <= 1.0
    assert (result.accuracy, result.agreement_on.kl) == (None, None)


def test_a_backbone_without_classes_is_evaluated_on_images_without_labels(
    tmp_path: Path, labeled_npz: Path
) -> None:
    model = make_vit(num_classes=0)
    quantize(model, tmp_path / "out", calibration=labeled_npz)
    evaluation = dfq.evaluate(tmp_path / "out", data=labeled_npz, float_model=model)
    assert (evaluation.metric, evaluation.accuracy, evaluation.kl, evaluation.images) == (
        "cosine",
        None,
        None,
        20,
    )
    assert evaluation.agreement is not None
    assert 0.9 < evaluation.agreement <= 1.0


def test_a_backbone_without_classes_has_no_accuracy_to_bound(
    tmp_path: Path, labeled_npz: Path
) -> None:
    with pytest.raises(SettingError, match="needs a classifier"):
        quantize(make_vit(num_classes=0), tmp_path / "out", eval=labeled_npz, min_accuracy=0.5)


def test_a_dataset_is_taken_as_calibration(tmp_path: Path, tiny: VisionTransformer) -> None:
    dfq.invert(tiny, method="smi", images=3, settings=FAST, out=tmp_path / "images")
    result = quantize(tiny, tmp_path / "out", calibration=tmp_path / "images", images=None)
    assert (result.calibration.method, result.calibration.images) == ("smi", 3)


@pytest.mark.parametrize("method", ["pri", "smi", "dmi", "noise"])
def test_every_method_gives_a_checkpoint(
    method: str, tmp_path: Path, tiny: VisionTransformer
) -> None:
    result = quantize(tiny, tmp_path / "out", calibration=method)
    assert result.calibration.method == method
    assert (tmp_path / "out" / "config.json").is_file()


def test_noise_needs_no_iterations_for_stages(tmp_path: Path, tiny: VisionTransformer) -> None:
    result = quantize(
        tiny,
        tmp_path / "out",
        calibration="noise",
        settings={"inversion": {"iterations": 1, "threads": 1}},
    )
    assert result.agreement is not None


def test_a_recipe_may_be_a_value(tmp_path: Path, tiny: VisionTransformer) -> None:
    recipe = dfq.Recipe(
        dfq.InversionSettings(images=3, iterations=2, stages=1, threads=1),
        dfq.QuantizationSettings(bits=4),
    )
    result = dfq.quantize(tiny, recipe=recipe, out=tmp_path / "out")
    assert (result.scheme, result.calibration.images) == ("w4a8", 3)


def test_arguments_win_over_the_recipe(tmp_path: Path, tiny: VisionTransformer) -> None:
    recipe = dfq.Recipe(dfq.InversionSettings(iterations=2, stages=1, threads=1))
    result = dfq.quantize(tiny, recipe=recipe, out=tmp_path / "out", images=5, bits=4)
    assert (result.scheme, result.calibration.images) == ("w4a8", 5)


def test_a_gate_carries_the_result(tmp_path: Path, tiny: VisionTransformer) -> None:
    with pytest.raises(dfq.GateError, match="accuracy is") as caught:
        quantize(tiny, tmp_path / "out", eval=hopeless(tmp_path), min_accuracy=0.3)
    assert isinstance(caught.value.result, QuantizeResult)
    high = 1 - 0.025**0.25
    accuracy = caught.value.result.accuracy
    assert accuracy is not None
    assert (accuracy.float, accuracy.quantized, accuracy.correct, accuracy.images) == (
        0.0,
        0.0,
        0,
        4,
    )
    assert accuracy.interval == pytest.approx([0.0, high])


def test_a_gate_leaves_the_checkpoint(tmp_path: Path, tiny: VisionTransformer) -> None:
    with pytest.raises(dfq.GateError):
        quantize(tiny, tmp_path / "out", eval=hopeless(tmp_path), min_accuracy=0.3)
    assert dfq.load(tmp_path / "out").arch.num_classes == 5


def test_a_bound_that_is_met_raises_nothing(tmp_path: Path, tiny: VisionTransformer) -> None:
    assert quantize(tiny, tmp_path / "out", min_agreement=0.0).agreement is not None


@pytest.mark.parametrize("bound", ["min_agreement", "min_accuracy"])
@pytest.mark.parametrize("value", [-0.1, 1.1, 90, float("nan")])
def test_bounds_are_shares(
    bound: str, value: float, tmp_path: Path, tiny: VisionTransformer, labeled_npz: Path
) -> None:
    with pytest.raises(SettingError, match=f"{bound} is .*a share from 0 to 1"):
        quantize(tiny, tmp_path / "out", eval=labeled_npz, **{bound: value})


def test_a_bound_of_accuracy_needs_data(tmp_path: Path, tiny: VisionTransformer) -> None:
    with pytest.raises(SettingError, match="min_accuracy needs data"):
        quantize(tiny, tmp_path / "out", min_accuracy=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"inversion": {"iteration": 4}},
        {"inversions": {"iterations": 4}},
        {"quantization": {"observr": "minmax"}},
    ],
    ids=str,
)
def test_an_unknown_setting_is_refused_by_name(
    settings: dict[str, Any], tmp_path: Path, tiny: VisionTransformer
) -> None:
    with pytest.raises(dfq.UsageError, match=r"iteration|inversions|observr"):
        quantize(tiny, tmp_path / "out", settings=settings)


def test_wrong_data_is_refused_before_anything_is_inverted(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        quantize(tiny, tmp_path / "out", eval=tmp_path / "nothing", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_wrong_calibration_is_refused_before_the_output_is_made(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    with pytest.raises(DataError, match=r"'pry' is neither a method.*Did you mean 'pri'"):
        quantize(tiny, tmp_path / "out", calibration="pry")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["iterations", "stages", "precision"])
def test_arguments_of_inversion_are_refused_where_nothing_is_inverted(
    tiny: VisionTransformer, tmp_path: Path, name: str
) -> None:
    value: Any = "float32" if name == "precision" else 2
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 16, 16, 3), np.uint8))
    given: dict[str, Any] = {"calibration": tmp_path / "x.npz", name: value}
    with pytest.raises(SettingError, match=f"{name} would have no effect"):
        dfq.quantize(tiny, **given, evaluate=False, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
