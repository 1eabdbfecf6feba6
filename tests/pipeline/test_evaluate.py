"""``evaluate`` and ``inspect`` from Python, ``models`` and ``doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api_calls import FAST, hopeless, quantize
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.data.preview import HEADING
from dfq.errors import SettingError
from dfq.results.values import EvaluateResult


def test_without_a_float_model_there_is_no_agreement(
    api_checkpoint: Path, labeled_npz: Path
) -> None:
    result = dfq.evaluate(api_checkpoint, data=labeled_npz)
    assert (result.agreement, result.kl) == (None, None)
    assert result.accuracy is not None
    assert result.accuracy_top5 is not None
    assert (result.accuracy.float, result.accuracy_top5.float) == (None, None)


def test_with_the_float_model_there_is_agreement(
    api_checkpoint: Path, labeled_npz: Path, api_model: VisionTransformer
) -> None:
    result = dfq.evaluate(api_checkpoint, data=labeled_npz, float_model=api_model)
    assert result.agreement is not None
    assert result.agreement >= 0.8
    assert result.kl is not None
    assert result.accuracy is not None
    assert result.accuracy.float is not None


def test_evaluation_counts_every_image(api_checkpoint: Path, labeled_npz: Path) -> None:
    result = dfq.evaluate(api_checkpoint, data=labeled_npz)
    assert (result.images, result.data) == (20, str(labeled_npz))
    assert result.accuracy_top5 is not None
    assert result.accuracy_top5.quantized == 1.0
    assert result.images_per_second > 0


def test_evaluation_repeats_what_quantization_measured(
    tmp_path: Path, tiny: VisionTransformer, labeled_npz: Path
) -> None:
    before = quantize(tiny, tmp_path / "out", eval=labeled_npz)
    after = dfq.evaluate(tmp_path / "out", data=labeled_npz, float_model=tiny)
    assert (after.accuracy, after.agreement) == (before.accuracy, before.agreement)


def test_the_reference_kernels_can_be_chosen(api_checkpoint: Path, labeled_npz: Path) -> None:
    result = dfq.evaluate(api_checkpoint, data=labeled_npz, backend="reference")
    assert result.backend == "reference"


def test_unknown_kernels_are_refused(api_checkpoint: Path, labeled_npz: Path) -> None:
    with pytest.raises(SettingError, match=r"'cublas'.*onednn.*reference"):
        dfq.evaluate(api_checkpoint, data=labeled_npz, backend="cublas")


def test_another_architecture_is_no_float_model(api_checkpoint: Path, labeled_npz: Path) -> None:
    with pytest.raises(SettingError, match="another architecture"):
        dfq.evaluate(api_checkpoint, data=labeled_npz, float_model=make_vit(depth=1))


@pytest.mark.parametrize(
    "args", [{"min_agreement": 0.5}, {"weights": "weights.safetensors"}], ids=str
)
def test_what_needs_a_float_model_asks_for_it(
    args: dict[str, Any], api_checkpoint: Path, labeled_npz: Path
) -> None:
    with pytest.raises(SettingError, match="float model"):
        dfq.evaluate(api_checkpoint, data=labeled_npz, **args)


def test_a_gate_of_evaluation_carries_the_result(api_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(dfq.GateError, match=r"below the bound of 0\.3") as caught:
        dfq.evaluate(api_checkpoint, data=hopeless(tmp_path), min_accuracy=0.3)
    assert isinstance(caught.value.result, EvaluateResult)


# ---- the rest


def test_models_can_be_searched() -> None:
    entries = dfq.models("deit_tiny")
    assert [e.name for e in entries if e.kind == "alias"] == ["deit_tiny"]
    assert "deit_tiny_patch16_224" in [e.name for e in entries]


def test_no_model_of_a_name_suggests_others() -> None:
    with pytest.raises(dfq.UsageError, match=r"'vitt_base_patch16'.*Did you mean"):
        dfq.models("vitt_base_patch16")


def test_a_checkpoint_can_be_inspected(api_checkpoint: Path) -> None:
    facts = dfq.inspect(api_checkpoint)
    assert (facts["kind"], facts["scheme"]) == ("checkpoint", "w8a8")
    assert facts["bytes"] == (api_checkpoint / "model.safetensors").stat().st_size


def test_a_dataset_can_be_inspected(tmp_path: Path, tiny: VisionTransformer) -> None:
    dfq.invert(tiny, images=4, settings=FAST, out=tmp_path / "images")
    facts = dfq.inspect(tmp_path / "images")
    assert (facts["kind"], facts["images"], facts["sparsity"]) == ("dataset", 4, 0.5)


def test_inspected_facts_are_json(api_checkpoint: Path) -> None:
    facts = dfq.inspect(api_checkpoint)
    assert json.loads(json.dumps(facts)) == facts


def test_a_dataset_can_be_drawn(tmp_path: Path, tiny: VisionTransformer) -> None:
    from PIL import Image

    dfq.invert(tiny, images=4, settings=FAST, out=tmp_path / "images")
    drawn = dfq.preview(tmp_path / "images", tmp_path / "sheet.png")
    with Image.open(drawn) as image:
        assert image.size == (2 * 112 + 6, 2 * 112 + 6 + HEADING)


def test_the_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfq import demo

    monkeypatch.setattr(demo, "WEIGHTS", tmp_path / "gone.safetensors")
    assert any("gone.safetensors is missing" in p for p in dfq.doctor().problems)


def test_the_doctor_says_where_the_cache_is(tmp_path: Path) -> None:
    assert dfq.doctor(tmp_path).cache == str(tmp_path)


def test_the_doctor_notices_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert any("cannot be written" in p for p in dfq.doctor(tmp_path / "file").problems)
