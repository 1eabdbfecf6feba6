"""Every family against timm: absent patches, attention, precision, files of other sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from families import FAMILIES, VARIANTS, Family
from safetensors.torch import save_file
from torch import Tensor, nn

from dfq.errors import SettingError, WeightsError
from dfq.sparse import patchify
from dfq.vit import Architecture, ViT
from dfq.vit.convert import convert
from dfq.vit.fit import load_into
from dfq.vit.load import load_model
from dfq.vit.positions import POSITION_TABLES
from dfq.vit.translate import translate

members = pytest.mark.parametrize(
    "family", [pytest.param(f, id=f.name) for f in [*FAMILIES, *VARIANTS]]
)
families = pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])


@pytest.fixture
def model(family: Family) -> Any:
    return family.make()


@pytest.fixture
def vit(family: Family, model: nn.Module) -> ViT:
    return convert(model, family.name)


def images_of(arch: Architecture, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, arch.in_channels, *arch.image_size, generator=generator)


def subset(arch: Architecture, images: Tensor, count: int = 7) -> tuple[Tensor, Tensor]:
    """Other patches of every image, in random order, and where they lie."""
    generator = torch.Generator().manual_seed(2)
    keep = torch.stack(
        [torch.randperm(arch.grid.patches, generator=generator)[:count] for _ in images]
    )
    patches = patchify(images, arch.grid)
    return patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1])), keep


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    scale = float(theirs.abs().max())
    assert ours.shape == theirs.shape
    assert scale > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * scale)


class Mask(nn.Module):
    """A bias of the scores in the place of BEiT's shared one."""

    def __init__(self, mask: Tensor, inner: nn.Module | None) -> None:
        super().__init__()
        self.mask, self.inner = mask, inner

    def forward(self) -> Tensor:
        return self.mask if self.inner is None else self.mask + self.inner()


def with_tokens_hidden(model: Any, images: Tensor, keep: Tensor) -> Tensor:
    """timm's output where no token attends to patches but ``keep`` ``[B, L]``, which alone
    are pooled."""
    prefix, total = model.num_prefix_tokens, model.patch_embed.num_patches
    index = torch.cat([torch.arange(prefix).expand(len(keep), -1), keep + prefix], dim=1)
    mask = torch.full((len(images), prefix + total), -torch.inf).scatter_(1, index, 0.0)
    mask = mask[:, None, None].expand(-1, 1, prefix + total, -1)
    if hasattr(model, "rel_pos_bias"):
        model.rel_pos_bias = Mask(mask, model.rel_pos_bias)
        tokens = model.forward_features(images)
    else:
        tokens = model.forward_features(images, attn_mask=mask)
    return model.forward_head(tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1])))


@members
@torch.no_grad()
def test_absent_patches_are_tokens_removed_from_timm(model: Any, vit: ViT) -> None:
    images = images_of(vit.arch)
    present, keep = subset(vit.arch, images)
    assert_same(vit.forward_sparse(present, keep), with_tokens_hidden(model, images, keep))


@members
def test_gradients_are_those_of_the_whole_last_block(vit: ViT) -> None:
    present, keep = subset(vit.arch, images_of(vit.arch))
    gradients = []
    for forward in (vit.forward_sparse, lambda x, at: vit.classify(vit.tokens(x, at))):
        x = present.clone().requires_grad_()
        forward(x, keep).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert_same(gradients[0], gradients[1])


@members
@torch.no_grad()
def test_bfloat16_is_close_to_float32(vit: ViT) -> None:
    present, keep = subset(vit.arch, images_of(vit.arch))
    expected = vit.forward_sparse(present, keep)
    actual = copy.deepcopy(vit).bfloat16()
    ours = actual.forward_sparse(present.bfloat16(), keep).float()
    assert float((ours - expected).norm() / expected.norm()) < 0.05
    attention = actual.importance(present.bfloat16(), keep)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, vit.importance(present, keep), rtol=0.2, atol=0.01)


def attention_of(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All attention probabilities that timm's model computes, in order, ``[B, H, Q, T]``."""
    maps: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        maps.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return fused(q, k, v, attn_mask=attn_mask, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", watched)
        model(images)
    return maps


@members
@torch.no_grad()
def test_importance_is_timms_attention(
    model: Any, vit: ViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, arch = images_of(vit.arch), vit.arch
    actual = attention_of(model, images, monkeypatch)[-1]
    if arch.pool == "avg":
        rows = actual[:, :, arch.num_prefix_tokens :]
    else:
        rows = actual[:, :, : arch.pooled_tokens]
    expected = rows.mean(dim=(1, 2))[:, rows.shape[-1] - arch.grid.patches :]
    positions = torch.arange(arch.grid.patches).expand(len(images), -1)
    ours = vit.importance(patchify(images, arch.grid), positions)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@members
def test_half_precision_models_convert(model: Any, family: Family, dtype: torch.dtype) -> None:
    vit = convert(model.to(dtype), family.name)
    assert {p.dtype for p in vit.parameters()} == {torch.float32}


def put(state: dict[str, Tensor], model: nn.Module, name: str, *, resize: bool) -> None:
    """Load a file's tensors into a model as ``--weights`` does."""
    told: dict[str, Any] = {"name": name, "path": Path("file")}
    load_into(model, translate(model, state, **told).state, **told, resize=resize)


@families
def test_weights_of_another_size_are_resampled_on_request_only(family: Family) -> None:
    other = family.make(img_size=24)
    state = {k: v.clone() for k, v in family.make().state_dict().items()}
    changed = [k for k, v in other.state_dict().items() if v.shape != state[k].shape]
    assert all(k.endswith(POSITION_TABLES) for k in changed)
    if changed:
        with pytest.raises(WeightsError, match=r"another image size.*img_size=16"):
            put(state, other, family.name, resize=False)
    put(state, other, family.name, resize=True)
    assert convert(other, family.name).arch.grid.patches == 36


def test_weights_in_metas_layout_of_dinov3_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    size: dict[str, Any] = {
        "img_size": 32,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    model = timm.create_model("vit_small_patch16_dinov3", **size)
    renamed = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    state = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.ones(4)}
    for key, value in model.state_dict().items():
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        state[key] = value + 0.5
    state["blocks.0.attn.qkv.bias"] = torch.zeros(144)
    put(state, model, "dinov3", resize=False)
    assert torch.equal(model.get_parameter("reg_token"), state["storage_tokens"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"])
def test_names_take_a_file_of_weights_at_a_size(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, img_size=32, num_classes=3)
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    loaded = load_model(name, weights=tmp_path / "file.safetensors", img_size=32)
    assert (loaded.vit.arch.image_size, loaded.vit.arch.num_classes) == ((32, 32), 3)
    with pytest.raises(WeightsError, match="another image size"):
        load_model(name, weights=tmp_path / "file.safetensors")
    with pytest.raises(SettingError, match="img_size is 8, less than a patch"):
        load_model(name, weights=tmp_path / "file.safetensors", img_size=8)
    with pytest.raises(WeightsError, match="num_classes=3"):
        load_model(name, weights=tmp_path / "file.safetensors", img_size=32, num_classes=4)
    with pytest.raises(SettingError, match="3 channels"):
        load_model(name, weights=tmp_path / "file.safetensors", img_size=32, mean=(0.5,))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"])
def test_dinov3_converts_as_timm_makes_it(name: str) -> None:
    size: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 2, "img_size": 32}
    assert convert(timm.create_model(name, **size), name).arch.rope
