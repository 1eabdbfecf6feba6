"""Input ranges: what values a network's input is made from, and in which units."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_vit
from exported_models import onnx_session
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.data.images import load_batches, open_images
from dfq.data.settings import SETTINGS
from dfq.errors import CheckpointError, DataError, DatasetError, SettingError
from dfq.inversion import Engine, plan_units
from dfq.inversion.units import units_of
from dfq.quantization import QuantizedViT, calibrate, quantize_vit
from dfq.quantization.scheme import Scheme
from dfq.recipe import InversionSettings, QuantizationSettings
from dfq.sparse import Grid, images_to_input, input_to_pixels, patchify, pixels_to_input
from dfq.vit import Preprocessing
from dfq.vit.architecture import from_json, to_json
from dfq.vit.load import LoadedModel, load_model
from dfq.vit.preprocessing import check_preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INVERSION = InversionSettings(iterations=4, images=8, precision="float32", threads=1)
FAST: dict[str, Any] = {"images": 8, "iterations": 4, "stages": 2}
PHYSICAL: dict[str, Any] = {
    "mean": (100.0, 0.0, -300.0), "std": (700.0, 600.0, 500.0), "input_range": (-1024.0, 3071.0)
}  # fmt: skip


def inverted(loaded: LoadedModel) -> list[dfq.SparseImages]:
    engine = Engine(loaded.vit, loaded.preprocessing, INVERSION)
    return [b for unit in plan_units(INVERSION, 16) for b in engine.run(unit)]


def quantized(loaded: LoadedModel, images: list[dfq.SparseImages]) -> QuantizedViT:
    chosen = QuantizationSettings(rounding="nearest")
    calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(chosen))
    return quantize_vit(loaded.vit, calibration, loaded.preprocessing, chosen)


def scaled(values: tuple[float, ...], factor: float, shift: float = 0.0) -> tuple[float, ...]:
    return tuple(v * factor + shift for v in values)


def levels(count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


def patches(images: torch.Tensor) -> torch.Tensor:
    return patchify(images, Grid((16, 16), (4, 4), 3))


# ---- metamorphic: units do not matter


@settings(max_examples=6)
@given(st.floats(1e-6, 1e6))
@example(255.0)
@example(2.0**20)
def test_units_of_the_input_do_not_matter(factor: float) -> None:
    """The same images, bit for bit, and the same logits; the factor's rounding, 2^-53, is lost in
    float32."""
    model = make_vit()
    ours = load_model(model, mean=MEAN, std=STD)
    theirs = load_model(
        model, mean=scaled(MEAN, factor), std=scaled(STD, factor), input_range=(0, factor)
    )
    images, others = inverted(ours), inverted(theirs)
    for a, b in zip(images, others, strict=True):
        assert torch.equal(a.patches, b.patches)
        assert torch.equal(a.positions, b.positions)
    x = images_to_input(levels(), ours.preprocessing)
    assert torch.equal(x, images_to_input(levels(), theirs.preprocessing))
    assert torch.equal(quantized(ours, images)(x), quantized(theirs, others)(x))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(1 / 255, 1)), min_size=1, max_size=3),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
)
def test_scale_and_offset_of_the_units_do_not_matter(
    channels: list[tuple[float, float]], factor: float, offset: float
) -> None:
    mean, std = tuple(m for m, _ in channels), tuple(s for _, s in channels)
    pixels = Preprocessing(mean, std)
    other = Preprocessing(
        scaled(mean, factor, offset),
        scaled(std, factor),
        input_range=(offset, factor + offset),
    )
    check_preprocessing(pixels, len(channels))
    check_preprocessing(other, len(channels))
    images = (
        torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, len(channels), -1, -1)
    )
    torch.testing.assert_close(
        images_to_input(images, other), images_to_input(images, pixels), rtol=1e-5, atol=1e-4
    )


def raw(model: VisionTransformer, mean: Any, std: Any, low: float, high: float) -> Any:
    """The same model, but of values in ``low..high`` as they come and not of normalized pixels."""
    model = copy.deepcopy(model)
    proj, width = model.patch_embed.proj, high - low
    m, s = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    with torch.no_grad():
        weight = proj.weight.double() / s
        proj.bias.copy_(proj.bias.double() - (weight * (m + low / width)).sum((1, 2, 3)))
        proj.weight.copy_(weight / width)
    return model


@pytest.mark.parametrize("span", [(0, 255), (-1, 1), (-1024, 3071), (0, 1e-3), (100, 102)])
def test_a_normalization_inside_the_network_gives_the_same(span: tuple[float, float]) -> None:
    """Of a mean and a spread of half and a quarter of the range, which are taken for data whose
    normalization is not known: the same images, integers and logits."""
    mean, std = (0.5,) * 3, (0.25,) * 3
    ours = load_model(make_vit(), mean=mean, std=std)
    theirs = load_model(raw(make_vit(), mean, std, *span), input_range=span)
    x, y = (images_to_input(levels(), loaded.preprocessing) for loaded in (ours, theirs))
    torch.testing.assert_close(theirs.vit(y), ours.vit(x), rtol=1e-3, atol=1e-3)
    images = inverted(ours)
    if units_of(theirs.preprocessing) is not theirs.preprocessing:
        for a, b in zip(images, inverted(theirs), strict=True):
            off = (a.patches.int() - b.patches.int()).abs()
            assert int(off.max()) <= 2
            assert float((off > 0).float().mean()) < 0.02
    p, q = quantized(ours, images), quantized(theirs, images)
    for name, integers in p.state_dict().items():
        if name.endswith(".weight") and not integers.is_floating_point():
            same = integers == q.state_dict()[name]
            assert float(same.float().mean()) > 0.999, name
    expected = ours.vit(x)
    assert torch.equal(p(x).argmax(1), q(y).argmax(1))
    assert float((q(y) - expected).norm()) < 1.5 * float((p(x) - expected).norm())


@pytest.mark.parametrize(
    "of_input",
    [
        {"input_range": (0, 255)},
        {"input_range": (-1024, 3071)},
        {"input_range": (10, 12)},
        {"input_range": (0, 1e-4)},
        {"mean": (0.0,) * 3, "std": (1 / 255,) * 3},
    ],
    ids=str,
)
def test_images_of_values_as_they_come_fill_the_range(of_input: dict[str, Any]) -> None:
    """Standard normal noise and steps of a fixed size would stay at one of its edges."""
    levels_ = torch.cat([b.patches.flatten() for b in inverted(load_model(make_vit(), **of_input))])
    assert 100 < float(levels_.float().mean()) < 155
    assert 30 < float(levels_.float().std()) < 100


def test_a_range_far_from_0_costs_the_patch_embedding_nothing() -> None:
    """What rounding its weights loses grows with the distance from where it is exact."""
    mean, std = (0.0,) * 3, (1.0,) * 3
    errors = []
    for span in ((0.0, 1.0), (500.0, 501.0)):
        loaded = load_model(raw(make_vit(), mean, std, *span), input_range=span)
        model = quantized(loaded, inverted(loaded))
        x = patches(images_to_input(levels(), loaded.preprocessing))
        expected = loaded.vit.double().patch_embed(x.double())
        spread = (expected - expected.mean((0, 1))).norm()
        errors.append(float((model.patch_embed(x) - expected).norm() / spread))
    assert errors[1] < 1.2 * errors[0] < 0.02


def test_a_level_stands_for_its_value() -> None:
    """(value - mean) / std, from the definition, in float64."""
    prepared = Preprocessing(**PHYSICAL)
    low, high = prepared.input_range
    x = images_to_input(levels(), prepared).double()
    values = low + levels().double() / 255 * (high - low)
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (prepared.mean, prepared.std))
    torch.testing.assert_close(x, (values - mean) / std, rtol=1e-6, atol=1e-6)


def test_every_level_survives_any_accepted_normalization(loaded: LoadedModel) -> None:
    grid = dataclasses.replace(loaded.vit.arch.grid, image_size=(16, 16), patch_size=(16, 16))
    pixels = torch.arange(256, dtype=torch.uint8).repeat(1, 3)
    for prepared in (
        Preprocessing(**PHYSICAL),
        Preprocessing((0.0,) * 3, (1 / 255,) * 3),
        Preprocessing((0.0,) * 3, (1.0,) * 3, input_range=(999.0, 1000.0)),
        Preprocessing((0.0,) * 3, (1.0,) * 3, input_range=(0.0, 1e6)),
    ):
        check_preprocessing(prepared, 3)
        x = pixels_to_input(pixels, prepared, grid)
        assert torch.equal(input_to_pixels(x, prepared, grid), pixels)


def test_a_models_own_values_need_no_mean_and_std(tiny: VisionTransformer) -> None:
    loaded = load_model(tiny, input_range=(-2.5, 3.0))
    assert loaded.preprocessing.mean == (0.0,) * 3
    assert loaded.preprocessing.std == (1.0,) * 3
    x = images_to_input(torch.tensor([[[[0, 255]]] * 3]), loaded.preprocessing)
    torch.testing.assert_close(x[0, 0, 0], torch.tensor([-2.5, 3.0]))


def test_the_range_of_pixels_said_is_the_range_of_pixels_not_said(tiny: VisionTransformer) -> None:
    assert load_model(tiny, input_range=(0, 1)).fingerprint == load_model(tiny).fingerprint


# ---- what is refused


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        (
            {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},
            r"mean is 123\.675.*std is 58\.395.*pixels / 255.*"
            r"give mean=\[0\.485, 0\.456, 0\.406\] and std=\[0\.229, 0\.224, 0\.225\], "
            r"or input_range=\(0, 255\)",
        ),
        ({"mean": (123.675, 116.28, 103.53)}, r"units of 0 to 255, give mean=\[0\.485"),
        ({"std": (58.4, 57.1, 57.4)}, r"units of 0 to 255, give std=\[0\.229"),
        ({"mean": (-4.27,) * 3, "std": (4.57,) * 3}, r"-4\.27.*with input_range"),
        ({"mean": (1.01,) * 3}, r"each mean is from 0 to 1"),
        ({"std": (1.01,) * 3}, r"each std from 0\.003922 to 1"),
        ({"std": (0.003,) * 3}, r"each std from 0\.003922 to 1"),
        ({"mean": MEAN, "input_range": (0, 255), "std": STD}, r"each std from 1 to 255"),
        ({"input_range": (1, 1)}, r"input_range is 1 to 1"),
        ({"input_range": (255, 0)}, "lowest and the highest"),
        ({"input_range": (0, float("inf"))}, "must be finite"),
        ({"input_range": (float("nan"), 1)}, "must be finite"),
        ({"input_range": (-1.7e308, 1.7e308)}, "lowest and the highest"),
        ({"input_range": (0,)}, "has 1 values"),
        ({"input_range": (0, 1, 2)}, "has 3 values"),
        ({"input_range": (1e6, 1e6 + 1)}, "too narrow for float32"),
        ({"input_range": "01"}, "input_range is '01'"),
    ],
)
def test_what_cannot_be_of_the_input_is_refused(
    given_: dict[str, Any], named: str, tiny: VisionTransformer
) -> None:
    with pytest.raises(SettingError, match=named):
        load_model(tiny, **given_)


def test_the_data_config_of_a_module_is_checked_too(tiny: Any) -> None:
    tiny.pretrained_cfg = {"mean": (123.675,) * 3, "std": (58.4,) * 3}
    with pytest.raises(SettingError, match=r"input_range=\(0, 255\)"):
        load_model(tiny)
    load_model(tiny, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [123.0] * 3},
        {"std": [4.0] * 3},
        {"input_range": [1.0, 0.0]},
        {"input_range": [0.0]},
        {"input_range": [0.0, "1"]},
        {"input_range": None},
    ],
)
def test_a_written_description_is_checked_as_a_given_one(change: dict[str, Any]) -> None:
    fields = {**to_json(Preprocessing(MEAN, STD)), **change}
    with pytest.raises(CheckpointError):
        check_preprocessing(from_json(Preprocessing, fields), 3)


# ---- what is written


def test_the_range_of_pixels_is_left_out_of_json() -> None:
    assert "input_range" not in to_json(Preprocessing(MEAN, STD))
    fields = to_json(Preprocessing(**PHYSICAL))
    assert fields["input_range"] == [-1024.0, 3071.0]
    assert from_json(Preprocessing, json.loads(json.dumps(fields))) == Preprocessing(**PHYSICAL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that takes physical values; its dataset is beside it."""
    place = tmp_path_factory.mktemp("physical")
    dfq.invert(make_vit(), out=place / "images", **FAST, **PHYSICAL)
    dfq.quantize(
        make_vit(),
        bits=8,
        calibration=place / "images",
        out=place / "ckpt",
        cache=place,
        **PHYSICAL,
    )
    return place / "ckpt"


def physical_npz(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1024, 3071, (20, 16, 16, 3))
    np.savez(path, **{"x": x, "y": np.arange(20) % 5, **changes})
    return path


def test_datasets_and_checkpoints_carry_the_range(checkpoint: Path) -> None:
    assert dfq.load(checkpoint).preprocessing.input_range == (-1024.0, 3071.0)
    assert dfq.inspect(checkpoint)["preprocessing"]["input_range"] == [-1024.0, 3071.0]
    facts = dfq.inspect(checkpoint.parent / "images")["preprocessing"]
    assert facts["input_range"] == [-1024.0, 3071.0]


def test_inspect_says_the_range_of_pixels(tmp_path: Path) -> None:
    dfq.invert("demo", out=tmp_path / "demo", images=2, iterations=1, stages=1)
    assert dfq.inspect(tmp_path / "demo")["preprocessing"]["input_range"] == [0.0, 1.0]
    assert "input_range" not in (tmp_path / "demo" / SETTINGS).read_text()


def test_a_dataset_whose_mean_is_out_of_range_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = json.loads((checkpoint.parent / "images" / SETTINGS).read_text())
    content["preprocessing"]["mean"] = [-5000.0] * 3
    (tmp_path / SETTINGS).write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="preprocessing"):
        dfq.inspect(tmp_path)


def test_evaluation_takes_the_range_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    data = physical_npz(tmp_path / "data.npz")
    result = dfq.evaluate(checkpoint, data=data, float_model=make_vit())
    assert result.agreement is not None
    assert result.agreement > 0.7


def test_students_carry_the_range(tmp_path: Path) -> None:
    dfq.distill(
        "demo", out=tmp_path / "s", depth=1, steps=1, images=4, iterations=2, stages=2,
        mean=[72.9], std=[90.0], input_range=(0, 255),
    )  # fmt: skip
    assert load_model(str(tmp_path / "s")).preprocessing.input_range == (0.0, 255.0)
    again = load_model(str(tmp_path / "s"), input_range=(0, 255)).preprocessing
    assert (again.mean, again.std) == ((72.9,), (90.0,))


# ---- the user's images


def test_values_are_rounded_as_the_patch_embedding_rounds(checkpoint: Path, tmp_path: Path) -> None:
    model = dfq.load(checkpoint).set_backend("reference")
    x = np.random.default_rng(3).uniform(-1024, 3071, (6, 16, 16, 3))
    source = open_images(
        physical_npz(tmp_path / "a.npz", x=x, y=np.arange(6) % 5),
        model.arch,
        model.preprocessing,
        labeled=True,
    )
    ((images, labels),) = load_batches(source, model.preprocessing, 20)
    p = model.preprocessing
    raw = torch.from_numpy(((x - p.mean) / p.std).astype(np.float32)).permute(0, 3, 1, 2)
    embed: Any = model.patch_embed
    assert torch.equal(embed.quantize_input(patches(images)), embed.quantize_input(patches(raw)))
    torch.testing.assert_close(model(images), model(raw))
    assert labels is not None


def test_a_model_of_pixels_takes_values_too(loaded: LoadedModel, tmp_path: Path) -> None:
    x = levels().permute(0, 2, 3, 1).numpy()
    for name, values in (("uint8", x), ("float", (x / 255).astype(np.float32))):
        np.savez(tmp_path / f"{name}.npz", x=values, y=np.zeros(4, int))
    sources = [
        open_images(tmp_path / f"{n}.npz", loaded.vit.arch, loaded.preprocessing, labeled=True)
        for n in ("uint8", "float")
    ]
    for i in range(4):
        assert np.array_equal(sources[0].pixels(i), sources[1].pixels(i))


def test_pixels_from_0_to_255_are_pixels(tiny: VisionTransformer, tmp_path: Path) -> None:
    loaded = load_model(tiny, mean=scaled(MEAN, 255), std=scaled(STD, 255), input_range=(0, 255))
    x = levels().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(4, int))
    source = open_images(tmp_path / "a.npz", loaded.vit.arch, loaded.preprocessing, labeled=True)
    assert np.array_equal(source.pixels(2), x[2])


BAD_VALUES: dict[str, tuple[Any, str]] = {
    "above": (np.full((1, 16, 16, 3), 3090.0), r"3090 to 3090.*range is -1024 to 3071"),
    "below": (np.full((1, 16, 16, 3), -1100.0), "-1100"),
    "normalized": (np.full((1, 16, 16, 3), np.nan), "768 values that are NaN"),
    "infinite": (np.full((1, 16, 16, 3), np.inf), "inf"),
    "another size": (np.zeros((1, 8, 8, 3)), r"\[1, 8, 8, 3\].*\[N, 16, 16, 3\]"),
    "one channel": (np.zeros((1, 16, 16)), r"\[N, 16, 16, 3\]"),
    "pixels": (np.zeros((1, 16, 16, 3), np.uint8), "8-bit pictures.*-1024 to 3071"),
    "16 bits": (np.zeros((1, 16, 16, 3), np.uint16), "uint16"),
}  # fmt: skip


@pytest.mark.parametrize(("x", "named"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_values_that_are_no_input_are_refused(x: Any, named: str, tmp_path: Path) -> None:
    loaded = load_model(make_vit(), **PHYSICAL)
    path = physical_npz(tmp_path / "a.npz", x=x, y=np.zeros(1, int))
    with pytest.raises(DataError, match=named) as caught:
        open_images(path, loaded.vit.arch, loaded.preprocessing, labeled=True)
    assert "a.npz" in str(caught.value)


def test_pictures_are_refused_by_a_model_of_other_values(tmp_path: Path) -> None:
    from PIL import Image

    loaded = load_model(make_vit(), **PHYSICAL)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="8-bit pictures"):
        open_images(tmp_path, loaded.vit.arch, loaded.preprocessing, labeled=False)


def test_values_of_float32_ends_are_in_the_range(tmp_path: Path) -> None:
    """0.1 in float32 is above 0.1."""
    loaded = load_model(make_vit(in_chans=1), input_range=(0, 0.1))
    np.savez(tmp_path / "a.npz", x=np.full((1, 16, 16), 0.1, np.float32))
    source = open_images(tmp_path / "a.npz", loaded.vit.arch, loaded.preprocessing, labeled=False)
    assert source.pixels(0).shape == (16, 16, 1)
    assert set(source.pixels(0).flatten()) == {255}


# ---- exports


def exported(checkpoint: Path, format: str, suffix: str) -> Path:
    path = checkpoint.parent / f"exported{suffix}"
    dfq.export(checkpoint, format=format, out=path)
    return path


def test_exports_read_the_same_input(checkpoint: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    model = dfq.load(checkpoint).set_backend("reference")
    x = images_to_input(levels(), model.preprocessing)
    expected = model(x)
    path = exported(checkpoint, "onnx", ".onnx")
    facts = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(facts["input_range"]) == [-1024.0, 3071.0]
    session = onnx_session(path)
    ir = exported(checkpoint, "openvino", ".xml")
    compiled = openvino.Core().compile_model(
        ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    program = torch.export.load(exported(checkpoint, "torch", ".pt2")).module()
    for y in (session.run(None, {"images": x.numpy()})[0], compiled(x.numpy())[0], program(x)):
        assert float((torch.as_tensor(y) - expected).norm() / expected.norm()) < 0.03
