"""The demo model and its images, as they are shipped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dfq
from dfq import demo
from dfq.cli.app import app
from dfq.data.images import open_images
from dfq.errors import SettingError
from dfq.results.values import QuantizeResult

FAST = {"iterations": 8, "stages": 2, "unit_size": 2, "threads": 1}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> QuantizeResult:
    """The demo quantized with few iterations and measured on 500 of the shipped images."""
    root = tmp_path_factory.mktemp("demo")
    with np.load(demo.TEST_SLICE, allow_pickle=False) as content:
        np.savez(root / "images.npz", x=content["x"][:500], y=content["y"][:500])
    return dfq.quantize(
        "demo",
        images=4,
        settings={"inversion": FAST},
        out=root / "out",
        cache=root / "cache",
        eval=root / "images.npz",
    )


# ---- files


def test_the_weights_are_small() -> None:
    assert demo.WEIGHTS.stat().st_size <= 6_000_000


def test_the_images_are_small() -> None:
    assert demo.TEST_SLICE.stat().st_size <= 1_500_000


def test_the_images_are_2000_gray_pictures() -> None:
    with np.load(demo.TEST_SLICE, allow_pickle=False) as content:
        x = content["x"]
    assert (x.dtype, x.shape) == (np.uint8, (2000, 28, 28))


def test_the_labels_are_the_ten_classes() -> None:
    with np.load(demo.TEST_SLICE, allow_pickle=False) as content:
        y = content["y"]
    assert (y.dtype, y.shape) == (np.uint8, (2000,))
    assert sorted(set(y.tolist())) == list(range(len(demo.CLASSES)))


def test_no_image_comes_twice() -> None:
    with np.load(demo.TEST_SLICE, allow_pickle=False) as content:
        digests = {hashlib.sha256(image.tobytes()).digest() for image in content["x"]}
    assert len(digests) == 2000


def test_the_license_of_the_images_is_shipped() -> None:
    text = demo.TEST_SLICE.with_name("LICENSE-fashion-mnist").read_text()
    assert "MIT" in text
    assert "Zalando" in text


def test_the_doctor_misses_no_demo_file() -> None:
    assert not any("is missing" in problem for problem in dfq.doctor().problems)


# ---- the model


def test_the_model_takes_small_gray_images() -> None:
    arch = dfq.load_model("demo").vit.arch
    assert (arch.image_size, arch.in_channels, arch.num_classes) == ((28, 28), 1, 10)


def test_the_model_has_its_own_preprocessing() -> None:
    preprocessing = dfq.load_model("demo").preprocessing
    assert (preprocessing.mean, preprocessing.std) == (demo.MEAN, demo.STD)


def test_preprocessing_is_that_of_the_images() -> None:
    with np.load(demo.TEST_SLICE, allow_pickle=False) as content:
        x = content["x"] / 255
    assert float(x.mean()) == pytest.approx(demo.MEAN[0], abs=0.01)
    assert float(x.std()) == pytest.approx(demo.STD[0], abs=0.01)


def test_the_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert dfq.load_model("demo").name == "demo"


def test_another_image_size_is_refused() -> None:
    with pytest.raises(SettingError, match=r"img_size is 32; the demo model takes 28"):
        dfq.load_model("demo", img_size=32)


# ---- quantization


def test_the_float_model_is_right_nine_times_of_ten(result: QuantizeResult) -> None:
    assert result.accuracy is not None
    assert result.accuracy.float is not None
    assert result.accuracy.float >= 0.905


def test_all_shipped_images_are_those_of_the_name_demo() -> None:
    loaded = dfq.load_model("demo")
    images = open_images("demo", loaded.vit.arch, loaded.preprocessing, labeled=True)
    assert (images.name, len(images)) == ("demo", 2000)


def test_eight_bits_keep_the_accuracy(result: QuantizeResult) -> None:
    assert result.accuracy is not None
    assert result.accuracy.float is not None
    assert result.accuracy.quantized >= result.accuracy.float - 0.02


def test_eight_bits_agree_with_the_float_model(result: QuantizeResult) -> None:
    assert result.agreement is not None
    assert result.agreement >= 0.95


def test_the_checkpoint_is_a_quarter_of_the_float_model(result: QuantizeResult) -> None:
    assert result.bytes.quantized < 0.3 * result.bytes.float


@torch.inference_mode()
def test_the_checkpoint_runs_on_its_own(result: QuantizeResult) -> None:
    model = dfq.load(result.checkpoint)
    with np.load(demo.TEST_SLICE, allow_pickle=False) as content:
        x, y = content["x"][:100], content["y"][:100]
    images = (torch.from_numpy(x)[:, None] / 255 - demo.MEAN[0]) / demo.STD[0]
    right = model(images).argmax(-1).numpy() == y
    assert right.mean() > 0.8


def test_the_command_line_quantizes_the_demo(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[inversion]\niterations = 4\nstages = 2\nunit_size = 1\nimages = 2\n")
    args = ["quantize", "demo", "--bits", "4", "--recipe", str(recipe), "--threads", "1"]
    args += ["--out", str(tmp_path / "out"), "--json"]
    ended = CliRunner().invoke(app, args)
    assert ended.exit_code == 0
    printed = json.loads(ended.stdout)
    assert (printed["model"], printed["scheme"]) == ("demo", "w4a8")
    assert (tmp_path / "out" / "model.safetensors").is_file()
