"""Cross-layer equalization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, VARIANTS, Family
from torch import Tensor

import dfq
from dfq.inversion import Engine, plan_units
from dfq.quantization import calibrate, quantize_vit
from dfq.quantization.calibration import Calibration
from dfq.quantization.equalization import OUTLIER_FACTOR, equalize, norm_linear_pairs, scale_pairs
from dfq.quantization.scheme import Scheme
from dfq.recipe import InversionSettings, QuantizationSettings
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import ViT
from dfq.vit.load import LoadedModel, load_model

SETTINGS = InversionSettings(iterations=4, images=8, precision="float32", threads=1)
W4 = QuantizationSettings(bits=4, attention="int8")


@pytest.fixture
def images(loaded: LoadedModel) -> list[SparseImages]:
    engine = Engine(loaded.vit, loaded.preprocessing, SETTINGS)
    return [b for unit in plan_units(SETTINGS, 16) for b in engine.run(unit)]


@pytest.fixture
def calibration(loaded: LoadedModel, images: list[SparseImages]) -> Calibration:
    for norm, _ in norm_linear_pairs(loaded.vit.arch):
        loaded.vit.get_parameter(f"{norm}.weight").data[3] *= 30
    return calibrate(loaded.vit, images, loaded.preprocessing, Scheme(W4))


def inputs(loaded: LoadedModel, images: list[SparseImages]) -> tuple[Tensor, Tensor]:
    p = loaded.preprocessing
    x = pixels_to_input(images[0].patches, p, loaded.vit.arch.grid)
    return x, images[0].positions


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_the_function_stays(
    loaded: LoadedModel, images: list[SparseImages], calibration: Calibration, strength: float
) -> None:
    equal, _ = equalize(loaded.vit, calibration, strength)
    at = inputs(loaded, images)
    torch.testing.assert_close(
        equal.forward_sparse(*at), loaded.vit.forward_sparse(*at), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_statistics_are_those_of_the_changed_model(
    loaded: LoadedModel, images: list[SparseImages], calibration: Calibration, strength: float
) -> None:
    equal, moved = equalize(loaded.vit, calibration, strength)
    again = calibrate(equal, images, loaded.preprocessing, Scheme(W4))
    for _, name in norm_linear_pairs(loaded.vit.arch):
        ours, theirs = moved.statistics[name], again.statistics[name]
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-3, atol=1e-3)
        assert ours.hessian is not None
        assert theirs.hessian is not None
        scale = float(theirs.hessian.abs().max())
        assert float((ours.hessian - theirs.hessian).abs().max()) < 1e-3 * scale
        low, high = moved.qparams[name].range
        assert low <= float(theirs.low.min()) * 0.99
        assert high >= float(theirs.high.max()) * 0.99
    for site, theirs in again.attention_statistics.items():
        ours = moved.attention_statistics[site]
        torch.testing.assert_close(ours.low, theirs.low, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.high, theirs.high, rtol=1e-3, atol=1e-3)
        assert moved.qparams[site].scale == pytest.approx(again.qparams[site].scale, rel=1e-3)


def test_channels_span_their_own_ranges_at_full_strength(
    loaded: LoadedModel, calibration: Calibration
) -> None:
    _, moved = equalize(loaded.vit, calibration, 1.0)
    for _, name in norm_linear_pairs(loaded.vit.arch):
        spans = moved.statistics[name].high - moved.statistics[name].low
        torch.testing.assert_close(spans, spans.max().expand_as(spans), rtol=1e-3, atol=1e-3)


def test_an_outlier_channel_costs_less(
    loaded: LoadedModel, images: list[SparseImages], calibration: Calibration
) -> None:
    settings = QuantizationSettings(bits=8, reduce_range=False)
    at = inputs(loaded, images)
    expected = loaded.vit.forward_sparse(*at)

    def error(strength: float) -> float:
        equal, moved = equalize(loaded.vit, calibration, strength)
        quantized = quantize_vit(equal, moved, loaded.preprocessing, settings)
        return float((quantized.forward_sparse(*at) - expected).norm() / expected.norm())

    assert error(0.5) < 0.7 * error(0.0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_how_size_is_split_between_norm_and_layer_does_not_matter(
    loaded: LoadedModel, images: list[SparseImages], bits: int, seed: int
) -> None:
    """Trained models have channels a hundred times larger than others."""
    settings = QuantizationSettings(bits=bits)
    at = inputs(loaded, images)
    expected = loaded.vit.forward_sparse(*at)

    def error() -> float:
        calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(settings))
        equal, moved = equalize(loaded.vit, calibration, settings.equalize)
        quantized = quantize_vit(equal, moved, loaded.preprocessing, settings)
        return float((quantized.forward_sparse(*at) - expected).norm() / expected.norm())

    before = error()
    rescale(loaded, seed)
    torch.testing.assert_close(loaded.vit.forward_sparse(*at), expected, rtol=1e-3, atol=1e-3)
    assert error() == pytest.approx(before, rel=0.1)


def rescale(loaded: LoadedModel, seed: int) -> None:
    """Channels after layer norms times 0.01 to 100, the next layers' columns divided by it."""
    g = torch.Generator().manual_seed(seed)
    for norm, layer in norm_linear_pairs(loaded.vit.arch):
        column = loaded.vit.get_parameter(f"{layer}.weight").data
        factor = 10 ** (torch.rand(column.shape[1], generator=g) * 4 - 2)
        loaded.vit.get_parameter(f"{norm}.weight").data.mul_(factor)
        loaded.vit.get_parameter(f"{norm}.bias").data.mul_(factor)
        column.div_(factor)


def test_without_a_strength_nothing_changes(loaded: LoadedModel, calibration: Calibration) -> None:
    equal, moved = equalize(loaded.vit, calibration, 0.0)
    assert equal is loaded.vit
    assert moved is calibration


# ---- channels that are no layer norm's: values, gated MLPs, the head's input

FACTOR = 100.0


@torch.no_grad()
def widen(vit: ViT, reader: str, factor: float, channel: int = 3) -> None:
    """A channel of a layer's input ``factor`` times as wide, the function unchanged."""
    arch = vit.arch
    if reader == "head":
        width, row = arch.embed_dim, channel
        writer = vit.get_submodule("fc_norm" if arch.pooled_norm else "norm")
    elif reader.endswith("fc2"):
        width, row = arch.mlp_hidden, arch.mlp_hidden + channel
        writer = vit.get_submodule(reader.replace("fc2", "fc1"))
    elif reader == "attn_pool.proj":
        width, row = arch.embed_dim, arch.embed_dim + channel
        writer = vit.get_submodule("attn_pool.kv")
    else:
        width, row = arch.attention_dim, 2 * arch.attention_dim + channel
        writer = vit.get_submodule(reader.replace("proj", "qkv"))
    for parameter in writer.parameters():
        parameter[row] *= factor
    vit.get_parameter(f"{reader}.weight")[:, channel::width] /= factor


MEMBERS = {f.name: f for f in [*FAMILIES, *VARIANTS]}
EXPECTED_PAIRS = {
    "ViT, DeiT": {"attn.proj", "head"},
    "DeiT, distilled": {"attn.proj", "head"},
    "ViT, average-pooled": {"attn.proj", "head"},
    "DINOv2, giant": {"attn.proj", "mlp.fc2", "head"},
    "SigLIP towers": {"attn.proj", "attn_pool.proj"},
    "EVA-02": {"attn.proj", "head"},
    "DINOv3, SwiGLU": {"attn.proj", "mlp.fc2", "head"},
    "inner norms": {"head"},
    "backbone": {"attn.proj"},
}


def test_pairs_are_those_between_which_channels_only_add_and_multiply() -> None:
    for name, expected in EXPECTED_PAIRS.items():
        arch = as_loaded(MEMBERS[name]).vit.arch
        readers = {pair.reader.removeprefix("blocks.0.") for pair in scale_pairs(arch)}
        assert {r for r in readers if not r.startswith("blocks.")} == expected, name


def as_loaded(family: Family) -> LoadedModel:
    model = family.make()
    channels = model.get_parameter("patch_embed.proj.weight").shape[1]
    return load_model(model, mean=[0.4] * channels, std=[0.25] * channels)


@pytest.mark.parametrize("family", MEMBERS.values(), ids=MEMBERS.keys())
@torch.no_grad()
def test_every_family_keeps_its_function_and_its_statistics(family: Family) -> None:
    loaded = as_loaded(family)
    for pair in scale_pairs(loaded.vit.arch):
        widen(loaded.vit, pair.reader, FACTOR)
    noise = dfq.fractal_noise(4, loaded.vit.arch.grid)
    calibration = calibrate(loaded.vit, [noise], loaded.preprocessing, Scheme(W4))
    equal, moved = equalize(loaded.vit, calibration, 0.5)
    x = pixels_to_input(noise.patches, loaded.preprocessing, loaded.vit.arch.grid)
    expected = loaded.vit.forward_sparse(x)
    error = float((equal.forward_sparse(x) - expected).norm() / expected.norm())
    assert error < 1e-3
    again = calibrate(equal, [noise], loaded.preprocessing, Scheme(W4))
    for pair in scale_pairs(loaded.vit.arch):
        ours, theirs = moved.statistics[pair.reader], again.statistics[pair.reader]
        size = float(theirs.max_abs.max())
        for a, b in ((ours.low, theirs.low), (ours.high, theirs.high), (ours.mean, theirs.mean)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * size)
        scale = moved.qparams[pair.reader].scale
        assert scale == pytest.approx(again.qparams[pair.reader].scale, rel=1e-3)
        assert scale < 0.3 * calibration.qparams[pair.reader].scale


@pytest.mark.parametrize("factor", [FACTOR, 1 / FACTOR])
def test_a_value_beyond_the_band_comes_back_to_it_and_the_rest_stays(
    factor: float, loaded: LoadedModel, images: list[SparseImages]
) -> None:
    before, _ = equalize(
        loaded.vit, calibrate(loaded.vit, images, loaded.preprocessing, Scheme(W4)), 0.5
    )
    name = "blocks.1.attn.proj.weight"
    assert torch.equal(before.get_parameter(name), loaded.vit.get_parameter(name))
    widen(loaded.vit, "blocks.1.attn.proj", factor)
    calibration = calibrate(loaded.vit, images, loaded.preprocessing, Scheme(W4))
    after, _ = equalize(loaded.vit, calibration, 0.5)
    changed = after.get_parameter(name) / before.get_parameter(name)
    others = torch.arange(changed.shape[1]) != 3
    torch.testing.assert_close(changed[:, others], torch.ones_like(changed[:, others]))
    left = float(changed[:, 3].mean())
    assert 1 / OUTLIER_FACTOR**2 < left < OUTLIER_FACTOR**2


WIDENED = [
    ("ViT, DeiT", "head"),
    ("DeiT, distilled", "head"),
    ("ViT, average-pooled", "head"),
    ("ViT, DeiT", "blocks.1.attn.proj"),
    ("DINOv2, giant", "blocks.1.mlp.fc2"),
    ("SigLIP towers", "attn_pool.proj"),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("family", "reader"), WIDENED)
@torch.no_grad()
def test_a_channel_a_hundred_times_wider_costs_nothing(family: str, reader: str, bits: Any) -> None:
    """Top-1 agreement and KL are those of the model without it; unequalized both collapse."""
    loaded = as_loaded(MEMBERS[family])
    images = dfq.fractal_noise(200, loaded.vit.arch.grid, first=500)
    x = pixels_to_input(images.patches, loaded.preprocessing, loaded.vit.arch.grid)
    expected = loaded.vit.forward_sparse(x)

    def measured(strength: float) -> tuple[float, float]:
        settings = QuantizationSettings(bits=bits, equalize=strength)
        seen = [dfq.fractal_noise(32, loaded.vit.arch.grid)]
        calibration = calibrate(loaded.vit, seen, loaded.preprocessing, Scheme(settings))
        equal, moved = equalize(loaded.vit, calibration, strength)
        model = quantize_vit(equal, moved, loaded.preprocessing, settings)
        logits = model.forward_sparse(x)
        kl = F.kl_div(
            logits.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean"
        )
        agree = logits.argmax(1) == expected.argmax(1)
        return float(kl), float(agree.float().mean())

    kl, agreement = measured(0.5)
    widen(loaded.vit, reader, FACTOR)
    torch.testing.assert_close(loaded.vit.forward_sparse(x), expected, rtol=1e-3, atol=1e-3)
    wide_kl, wide_agreement = measured(0.5)
    assert wide_kl < 1.3 * kl + 1e-5
    assert wide_agreement > agreement - 0.02
    assert measured(0.0)[0] > 1.5 * wide_kl
