"""The public surface: what can be imported, what it takes and what it returns."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.data.preview import HEADING
from dfq.errors import DataError, SettingError
from dfq.results.values import (
    AgreementOn,
    Bytes,
    CalibrationSource,
    EvaluateResult,
    FloatQuantized,
    InvertResult,
    QuantizeResult,
    Seconds,
    to_json,
)

PUBLIC = [
    "BenchmarkResult",
    "CacheEntry",
    "DfqError",
    "DistillResult",
    "DistillationSettings",
    "DoctorReport",
    "EvaluateResult",
    "ExportResult",
    "GateError",
    "InversionSettings",
    "InvertResult",
    "LoadedModel",
    "ModelEntry",
    "QuantizationSettings",
    "QuantizeResult",
    "QuantizedViT",
    "Recipe",
    "RunError",
    "SparseImageDataset",
    "SparseImages",
    "UsageError",
    "__version__",
    "benchmark",
    "distill",
    "doctor",
    "evaluate",
    "export",
    "fractal_noise",
    "inspect",
    "invert",
    "list_cache",
    "load",
    "load_model",
    "load_recipe",
    "models",
    "preview",
    "quantize",
    "remove_cached",
    "verify_cache",
    "write_dataset",
]

FAST: dict[str, Any] = {"iterations": 4, "stages": 2, "threads": 1}


def quantize(model: VisionTransformer, out: Path, **changes: Any) -> QuantizeResult:
    args: dict[str, Any] = {"images": 4, "settings": {"inversion": FAST}, "out": out}
    return dfq.quantize(model, **{**args, **changes})


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return make_vit()


@pytest.fixture(scope="module")
def checkpoint(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    quantize(model, root / "w8a8", cache=root / "cache")
    return root / "w8a8"


# ---- names


def test_the_public_names_are_these() -> None:
    assert dfq.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_used(name: str) -> None:
    assert getattr(dfq, name) is not None


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_listed(name: str) -> None:
    assert name in dir(dfq)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(dfq, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dfq' has no attribute 'quantise'"):
        _ = dfq.quantise


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["dfq", "dfq.cli.app"])
def test_importing_loads_neither_torch_nor_timm(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'timm', 'numpy'}} & set(sys.modules)))"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", ["UsageError", "RunError", "GateError"])
def test_every_error_is_a_dfq_error(name: str) -> None:
    assert issubclass(getattr(dfq, name), dfq.DfqError)


# ---- quantize


@torch.no_grad()
def test_a_module_in_memory_becomes_a_checkpoint(
    model: VisionTransformer, checkpoint: Path
) -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = model(images)
    found = dfq.load(checkpoint)(images)
    assert float((found - exact).norm() / (exact - exact.mean(0)).norm()) < 0.3


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


def test_a_result_is_called_as_an_inverted_dataset_is(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
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
    tmp_path: Path, tiny: VisionTransformer, labelled_npz: Path
) -> None:
    result = quantize(tiny, tmp_path / "out", eval=labelled_npz)
    assert result.accuracy is not None
    assert result.agreement_on is not None
    assert result.agreement_on.data == str(labelled_npz)
    assert result.agreement_on.images == 20


def test_float_accuracy_is_that_of_the_module(
    tmp_path: Path, tiny: VisionTransformer, labelled_npz: Path
) -> None:
    result = quantize(tiny, tmp_path / "out", eval=labelled_npz, mean=(0.5,) * 3, std=(0.25,) * 3)
    data = np.load(labelled_npz)
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
    tmp_path: Path, labelled_npz: Path
) -> None:
    model = make_vit(num_classes=0)
    quantize(model, tmp_path / "out", calibration=labelled_npz)
    found = dfq.evaluate(tmp_path / "out", data=labelled_npz, float_model=model)
    assert (found.metric, found.accuracy, found.kl, found.images) == ("cosine", None, None, 20)
    assert found.agreement is not None
    assert 0.9 < found.agreement <= 1.0


def test_a_backbone_without_classes_has_no_accuracy_to_bound(
    tmp_path: Path, labelled_npz: Path
) -> None:
    with pytest.raises(SettingError, match="needs a classifier"):
        quantize(make_vit(num_classes=0), tmp_path / "out", eval=labelled_npz, min_accuracy=0.5)


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
    expected = FloatQuantized(0.0, 0.0, correct=0, images=4, interval=[0.0, pytest.approx(high)])
    assert caught.value.result.accuracy == expected


def hopeless(tmp_path: Path) -> Path:
    """Images with labels that the tiny model finds the least likely."""
    x = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    model = dfq.load_model(make_vit())
    p = model.preprocessing
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor(p.mean)[:, None, None], torch.tensor(p.std)[:, None, None]
    worst = model.vit((pixels - mean) / std).argmin(-1)
    np.savez(tmp_path / "wrong.npz", x=x, y=worst.numpy())
    return tmp_path / "wrong.npz"


def test_a_gate_leaves_the_checkpoint(tmp_path: Path, tiny: VisionTransformer) -> None:
    with pytest.raises(dfq.GateError):
        quantize(tiny, tmp_path / "out", eval=hopeless(tmp_path), min_accuracy=0.3)
    assert dfq.load(tmp_path / "out").arch.num_classes == 5


def test_a_bound_that_is_met_raises_nothing(tmp_path: Path, tiny: VisionTransformer) -> None:
    assert quantize(tiny, tmp_path / "out", min_agreement=0.0).agreement is not None


@pytest.mark.parametrize("bound", ["min_agreement", "min_accuracy"])
@pytest.mark.parametrize("value", [-0.1, 1.1, 90, float("nan")])
def test_bounds_are_shares(
    bound: str, value: float, tmp_path: Path, tiny: VisionTransformer, labelled_npz: Path
) -> None:
    with pytest.raises(SettingError, match=f"{bound} is .*a share from 0 to 1"):
        quantize(tiny, tmp_path / "out", eval=labelled_npz, **{bound: value})


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


# ---- invert


def test_inversion_returns_what_it_wrote(tmp_path: Path, tiny: VisionTransformer) -> None:
    result = dfq.invert(tiny, images=4, settings=FAST, out=tmp_path / "images")
    dataset = dfq.SparseImageDataset(tmp_path / "images")
    assert result.path == str(tmp_path / "images")
    assert (result.images, result.bytes) == (len(dataset), dataset.bytes)
    assert (result.method, result.cached) == ("pri", False)


def test_the_second_inversion_comes_from_the_cache(tiny: VisionTransformer) -> None:
    first = dfq.invert(tiny, images=4, settings=FAST)
    second = dfq.invert(tiny, images=4, settings=FAST)
    assert (first.cached, second.cached) == (False, True)
    assert first.path == second.path


def of_patches(count: int) -> VisionTransformer:
    return make_vit(img_size=(4, 4 * count))


@pytest.mark.parametrize("patches", [1, 2, 3])
def test_fewer_patches_than_stages_lower_their_default(patches: int, tmp_path: Path) -> None:
    model = of_patches(patches)
    settings = {"iterations": 6, "threads": 1}
    dfq.invert(model, images=5, settings=settings, out=tmp_path / "images")
    dataset = dfq.SparseImageDataset(tmp_path / "images")
    assert [len(dataset), dataset.settings["inversion"]["stages"]] == [5, patches]
    assert {shard.patches for shard in dataset.shards} == {1}
    result = quantize(model, tmp_path / "out", settings={"inversion": settings})
    assert result.agreement is not None
    recipe = dfq.load_recipe(tmp_path / "out" / "recipe.toml")
    assert recipe.inversion.stages == patches


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_fewer_iterations_than_stages_lower_their_default(
    iterations: int, tmp_path: Path, tiny: VisionTransformer
) -> None:
    dfq.invert(tiny, images=5, iterations=iterations, threads=1, out=tmp_path / "images")
    dataset = dfq.SparseImageDataset(tmp_path / "images")
    assert dataset.settings["inversion"]["stages"] == iterations


@pytest.mark.parametrize("how", ["argument", "settings", "recipe", "file"])
def test_stages_that_were_asked_for_are_not_lowered(how: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[inversion]\nstages = 3\n")
    asked: dict[str, Any] = {
        "argument": {"stages": 3},
        "settings": {"settings": {"stages": 3}},
        "recipe": {"recipe": dfq.Recipe(dfq.InversionSettings(stages=3))},
        "file": {"recipe": tmp_path / "r.toml"},
    }[how]
    message = r"stages is 3, but there are only 2 patches; give at most 2"
    with pytest.raises(SettingError, match=message):
        dfq.invert(of_patches(2), images=4, threads=1, out=tmp_path / "images", **asked)
    if how == "settings":
        asked = {"settings": {"inversion": {"stages": 3}}}
    with pytest.raises(SettingError, match=message):
        dfq.quantize(of_patches(2), images=4, threads=1, out=tmp_path / "out", **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


# ---- evaluate


def test_without_a_float_model_there_is_no_agreement(checkpoint: Path, labelled_npz: Path) -> None:
    result = dfq.evaluate(checkpoint, data=labelled_npz)
    assert (result.agreement, result.kl) == (None, None)
    assert (result.accuracy.float, result.accuracy_top5.float) == (None, None)


def test_with_the_float_model_there_is_agreement(
    checkpoint: Path, labelled_npz: Path, model: VisionTransformer
) -> None:
    result = dfq.evaluate(checkpoint, data=labelled_npz, float_model=model)
    assert result.agreement is not None
    assert result.agreement >= 0.8
    assert result.kl is not None
    assert result.accuracy.float is not None


def test_evaluation_counts_every_image(checkpoint: Path, labelled_npz: Path) -> None:
    result = dfq.evaluate(checkpoint, data=labelled_npz)
    assert (result.images, result.data) == (20, str(labelled_npz))
    assert result.accuracy_top5.quantized == 1.0
    assert result.images_per_second > 0


def test_evaluation_repeats_what_quantization_measured(
    tmp_path: Path, tiny: VisionTransformer, labelled_npz: Path
) -> None:
    before = quantize(tiny, tmp_path / "out", eval=labelled_npz)
    after = dfq.evaluate(tmp_path / "out", data=labelled_npz, float_model=tiny)
    assert (after.accuracy, after.agreement) == (before.accuracy, before.agreement)


def test_the_reference_kernels_can_be_chosen(checkpoint: Path, labelled_npz: Path) -> None:
    result = dfq.evaluate(checkpoint, data=labelled_npz, backend="reference")
    assert result.backend == "reference"


def test_unknown_kernels_are_refused(checkpoint: Path, labelled_npz: Path) -> None:
    with pytest.raises(SettingError, match=r"'cublas'.*onednn.*reference"):
        dfq.evaluate(checkpoint, data=labelled_npz, backend="cublas")


def test_another_architecture_is_no_float_model(checkpoint: Path, labelled_npz: Path) -> None:
    with pytest.raises(SettingError, match="another architecture"):
        dfq.evaluate(checkpoint, data=labelled_npz, float_model=make_vit(depth=1))


@pytest.mark.parametrize(
    "args", [{"min_agreement": 0.5}, {"weights": "weights.safetensors"}], ids=str
)
def test_what_needs_a_float_model_asks_for_it(
    args: dict[str, Any], checkpoint: Path, labelled_npz: Path
) -> None:
    with pytest.raises(SettingError, match="float model"):
        dfq.evaluate(checkpoint, data=labelled_npz, **args)


def test_a_gate_of_evaluation_carries_the_result(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(dfq.GateError, match=r"below the bound of 0\.3") as caught:
        dfq.evaluate(checkpoint, data=hopeless(tmp_path), min_accuracy=0.3)
    assert isinstance(caught.value.result, EvaluateResult)


# ---- results

RESULTS = [
    QuantizeResult,
    InvertResult,
    EvaluateResult,
    CalibrationSource,
    Seconds,
    Bytes,
    FloatQuantized,
    AgreementOn,
]


@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_frozen(kind: type[Any]) -> None:
    result = kind(*[None for _ in dataclasses.fields(kind)])
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, dataclasses.fields(kind)[0].name, 1)


def fields_of(kind: Callable[..., Any]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def test_json_has_the_fields_of_the_results(
    tmp_path: Path, tiny: VisionTransformer, labelled_npz: Path
) -> None:
    found = to_json(quantize(tiny, tmp_path / "out", eval=labelled_npz))
    assert list(found) == fields_of(QuantizeResult)
    assert list(found["calibration"]) == fields_of(CalibrationSource)
    assert list(found["seconds"]) == fields_of(Seconds)
    assert list(found["bytes"]) == fields_of(Bytes)
    assert list(found["accuracy"]) == fields_of(FloatQuantized)
    assert list(found["agreement_on"]) == fields_of(AgreementOn)


def test_results_are_json(tmp_path: Path, tiny: VisionTransformer) -> None:
    found = to_json(quantize(tiny, tmp_path / "out"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_report_in_the_checkpoint_is_the_result(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    result = to_json(quantize(tiny, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {k: v for k, v in report.items() if k != "seconds"} == {
        k: v for k, v in result.items() if k != "seconds"
    }


def test_stages_add_up_to_no_more_than_the_total(tmp_path: Path, tiny: VisionTransformer) -> None:
    seconds = quantize(tiny, tmp_path / "out").seconds
    stages = [seconds.load, seconds.invert, seconds.calibrate, seconds.quantize, seconds.evaluate]
    assert min(stages) > 0
    assert sum(stages) <= seconds.total


# ---- the rest


def test_models_can_be_searched() -> None:
    found = dfq.models("deit_tiny")
    assert [e.name for e in found if e.kind == "alias"] == ["deit_tiny"]
    assert "deit_tiny_patch16_224" in [e.name for e in found]


def test_no_model_of_a_name_suggests_others() -> None:
    with pytest.raises(dfq.UsageError, match=r"'vitt_base_patch16'.*Did you mean"):
        dfq.models("vitt_base_patch16")


def test_a_checkpoint_can_be_inspected(checkpoint: Path) -> None:
    facts = dfq.inspect(checkpoint)
    assert (facts["kind"], facts["scheme"]) == ("checkpoint", "w8a8")
    assert facts["bytes"] == (checkpoint / "model.safetensors").stat().st_size


def test_a_dataset_can_be_inspected(tmp_path: Path, tiny: VisionTransformer) -> None:
    dfq.invert(tiny, images=4, settings=FAST, out=tmp_path / "images")
    facts = dfq.inspect(tmp_path / "images")
    assert (facts["kind"], facts["images"], facts["sparsity"]) == ("dataset", 4, 0.5)


def test_inspected_facts_are_json(checkpoint: Path) -> None:
    facts = dfq.inspect(checkpoint)
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
