"""Every family of models: timm's own outputs, sparse images, quantization, the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, VARIANTS, Family, table
from safetensors.torch import save_file
from torch import Tensor, nn

import dfq
from dfq.sparse import patchify
from dfq.vit import ViT
from dfq.vit.fit import load_into
from dfq.vit.load import LoadedModel, load_model
from dfq.vit.translate import translate
from dfq.vit.weights import read_weights

ALL = [pytest.param(f, id=f.name) for f in [*FAMILIES, *VARIANTS]]
FAST: dict[str, Any] = {
    "inversion": {"iterations": 4, "precision": "float32", "threads": 1, "unit_size": 2}
}


@pytest.fixture
def model(family: Family) -> nn.Module:
    return family.make()


@pytest.fixture
def loaded(model: nn.Module) -> LoadedModel:
    channels = model.get_parameter("patch_embed.proj.weight").shape[1]
    return load_model(model, mean=[0.4] * channels, std=[0.25] * channels)


def images_for(vit: ViT, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, vit.arch.in_channels, *vit.arch.image_size, generator=generator)


def some_positions(vit: ViT, live: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    count = vit.arch.grid.patches
    rows = [torch.randperm(count, generator=generator)[:live] for _ in range(2)]
    return torch.stack(rows)


def pick(vit: ViT, images: Tensor, positions: Tensor) -> Tensor:
    patches = patchify(images, vit.arch.grid)
    return patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[2]))


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_all_patches_give_what_timm_gives(model: nn.Module, loaded: LoadedModel) -> None:
    vit, images = loaded.vit, images_for(loaded.vit, 3)
    expected = model(images)
    torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-4)
    order = torch.arange(vit.arch.grid.patches).expand(3, -1)
    patches = patchify(images, vit.arch.grid)
    torch.testing.assert_close(vit.forward_sparse(patches, order), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_the_order_of_patches_does_not_matter_and_their_places_do(loaded: LoadedModel) -> None:
    vit = loaded.vit
    positions = some_positions(vit)
    patches = pick(vit, images_for(vit), positions)
    actual = vit.forward_sparse(patches, positions)
    turned = vit.forward_sparse(patches.flip(1), positions.flip(1))
    torch.testing.assert_close(turned, actual, rtol=1e-4, atol=1e-4)
    elsewhere = vit.forward_sparse(patches, (positions + 1) % vit.arch.grid.patches)
    assert float((elsewhere - actual).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_the_last_block_computes_what_is_pooled(loaded: LoadedModel) -> None:
    vit = loaded.vit
    positions = some_positions(vit)
    patches = pick(vit, images_for(vit), positions)
    torch.testing.assert_close(
        vit.forward_sparse(patches, positions), vit.classify(vit.tokens(patches, positions))
    )


@pytest.mark.parametrize("family", ALL)
def test_importance_shares_out_the_attention_that_patches_get(loaded: LoadedModel) -> None:
    vit = loaded.vit
    positions = some_positions(vit)
    patches = pick(vit, images_for(vit), positions)
    actual = vit.importance(patches, positions)
    assert actual.shape == positions.shape
    assert bool((actual > 0).all())
    assert bool((actual.sum(1) <= 1 + 1e-5).all())
    turned = vit.importance(patches.flip(1), positions.flip(1))
    torch.testing.assert_close(turned.flip(1), actual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("bits", "attention"), [(4, "int8"), (8, "float")])
@pytest.mark.parametrize("family", ALL)
def test_inversion_quantization_and_the_disk(
    model: nn.Module, loaded: LoadedModel, bits: int, attention: str, tmp_path: Path
) -> None:
    p = loaded.preprocessing
    result = dfq.quantize(
        model,
        bits=bits,
        attention=attention,
        calibration="pri",
        images=8,
        mean=p.mean,
        std=p.std,
        settings=FAST,
        out=tmp_path / "out",
    )
    assert result.agreement is not None
    assert result.agreement_on is not None
    assert result.agreement_on.metric == ("top1" if loaded.vit.arch.num_classes else "cosine")
    quantized = dfq.load(tmp_path / "out")
    assert torch.equal(
        quantized(images_for(loaded.vit)), dfq.load(tmp_path / "out")(images_for(loaded.vit))
    )
    assert quantized.arch == loaded.vit.arch
    on_pixels = _sparse_images(loaded)
    ours, theirs = quantized.forward_sparse(*on_pixels), loaded.vit.forward_sparse(*on_pixels)
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < {4: 0.5, 8: 0.2}[bits]


def _sparse_images(loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    vit, p = loaded.vit, loaded.preprocessing
    generator = torch.Generator().manual_seed(3)
    shape = (2, vit.arch.in_channels, *vit.arch.image_size)
    images = (torch.rand(shape, generator=generator) - p.mean[0]) / p.std[0]
    positions = some_positions(vit)
    return pick(vit, images, positions), positions


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_examples_are_names_of_timm(family: Family) -> None:
    known = set(timm.list_models())
    assert set(family.examples.split(", ")) <= known


def test_the_table_in_the_docs_is_that_of_the_tested_families() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert table() in page


@pytest.mark.parametrize("family", ALL)
def test_weights_of_the_family_survive_a_file(family: Family, tmp_path: Path) -> None:
    model, path = family.make(), tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    again = family.make()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    told: dict[str, Any] = {"name": family.name, "path": path}
    state = translate(again, read_weights(path), **told)
    load_into(again, state.state, **told, resize=False)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
