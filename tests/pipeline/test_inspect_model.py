"""``dfq.inspect`` of models, without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, cli  # noqa: F401

import dfq
from dfq.errors import DatasetError, SettingError, UnknownModelError, WeightsError


def test_a_model_is_described_without_weights() -> None:
    facts = dfq.inspect("vit_base")
    expected = {
        "kind": "model",
        "timm_name": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "family": "vision_transformer",
        "supported": True,
        "reason": None,
        "parameters": 86_567_656,
        "image_size": [224, 224],
        "grid": [14, 14],
        "width": 768,
        "depth": 12,
        "heads": 12,
        "classes": 1000,
    }
    assert {key: facts[key] for key in expected} == expected
    assert facts["bytes"]["float"] == 4 * 86_567_656
    assert facts["preprocessing"]["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_size_of_a_checkpoint_is_known_before(bits: int, tmp_path: Path) -> None:
    said = dfq.inspect("demo")["bytes"][f"w{bits}a8"]
    fast = {"calibration": "noise", "images": 2, "settings": {"inversion": {"iterations": 1}}}
    arguments: dict[str, Any] = {**fast, "bits": bits, "stages": 1, "cache": tmp_path / "cache"}
    made = dfq.quantize("demo", out=tmp_path / "out", **arguments).bytes.quantized
    assert said <= made <= 1.05 * said + 10_000  # names and shapes come on top


def test_a_refused_model_says_why() -> None:
    facts = dfq.inspect("vit_base_patch16_rpn_224")
    assert facts["supported"] is False
    assert "ResPostBlock" in facts["reason"]
    assert facts["parameters"] == 86_538_472


def test_other_kinds_of_models_are_refused_too() -> None:
    facts = dfq.inspect("resnet18")
    assert (facts["supported"], facts["family"]) == (False, "resnet")


def test_options_change_the_shape() -> None:
    facts = dfq.inspect("vit_tiny", img_size=[32, 64], num_classes=10, in_chans=1)
    assert (facts["grid"], facts["classes"]) == ([2, 4], 10)
    assert facts["architecture"]["in_channels"] == 1
    assert dfq.inspect("vit_tiny", global_pool="avg")["architecture"]["pool"] == "avg"


def test_weights_decide_the_shape(small_weights: Path) -> None:
    facts = dfq.inspect("test_vit", weights=small_weights, img_size=32)
    assert facts["image_size"] == [32, 32]
    assert facts["weights"] == str(small_weights)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError):
        dfq.inspect("test_vit", weights=tmp_path / "x.safetensors")


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student in a directory that is called as the demo is."""
    monkeypatch.chdir(tmp_path)
    effort: dict[str, Any] = {"depth": 1, "steps": 1, "images": 2, "data": "noise"}
    inversion = {"iterations": 1, "stages": 1}
    dfq.distill("demo", out="demo", settings={"inversion": inversion}, **effort)
    return tmp_path / "demo"


def test_a_path_goes_before_a_model(student: Path) -> None:
    assert dfq.inspect("demo")["kind"] == "student"
    assert dfq.inspect(student)["kind"] == "student"
    with pytest.raises(SettingError, match="num_classes"):
        dfq.inspect("demo", num_classes=3)


def test_another_directory_of_a_models_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    with pytest.raises(DatasetError, match=r"neither.*in another directory"):
        dfq.inspect("demo")


def test_a_name_of_nothing_is_refused() -> None:
    with pytest.raises(UnknownModelError, match=r"no file or directory 'vit_bsae'.*'vit_base'"):
        dfq.inspect("vit_bsae")
    with pytest.raises(DatasetError, match="does not exist"):
        dfq.inspect("images/of_mine")


def test_the_command_shows_a_model(cli: Cli) -> None:  # noqa: F811
    shown = cli("inspect", "vit_tiny", "--img-size", "32,64").stdout
    assert "2, 4" in shown
    assert "w4a8" in shown
    assert cli("inspect", "vit_tiny", "--json").json["depth"] == 12
