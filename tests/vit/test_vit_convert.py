"""timm's vision transformers and their copies: equal outputs, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import (
    ConvMlp,
    DiffAttention,
    GELUTanh,
    LayerNorm,
    QuickGELU,
    RmsNorm,
)
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from dfq.errors import UnsupportedModelError, WeightsError
from dfq.sparse import patchify
from dfq.vit import ViT
from dfq.vit.convert import convert, describe

VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average of patches": {"global_pool": "avg"},
    "average without a class token": {"global_pool": "avg", "class_token": False},
    "average with the prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "average, norm before the pool": {"global_pool": "avg", "fc_norm": False},
    "class token, norm after the pool": {"fc_norm": True},
    "no final norm": {"final_norm": False},
    "registers": {"reg_tokens": 3},
    "registers without position": {"reg_tokens": 3, "no_embed_class": True},
    "registers, no class token": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "class token without position": {"no_embed_class": True},
    "no position embedding": {"pos_embed": "none"},
    "CLIP": {"pre_norm": True, "act_layer": QuickGELU, "norm_layer": nn.LayerNorm},
    "gelu by name": {"act_layer": "gelu"},
    "tanh gelu by name": {"act_layer": "gelu_tanh"},
    "tanh gelu of timm": {"act_layer": GELUTanh},
    "tanh gelu of torch": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "layer scale": {"init_values": 0.3},
    "query and key norms": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "no projection bias": {"proj_bias": False},
    "norms without bias": {"norm_layer": partial(LayerNorm, bias=False)},
    "norm in the patch embedding": {"embed_norm_layer": LayerNorm},
    "other epsilon": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "backbone": {"num_classes": 0},
    "backbone with an average": {"num_classes": 0, "global_pool": "avg"},
    "one head": {"num_heads": 1},
    "narrow MLP": {"mlp_ratio": 0.5},
    "one block": {"depth": 1},
    "rectangular image": {"img_size": (12, 20)},
    "rectangular patches": {"patch_size": (2, 4)},
    "patches that leave a margin": {"img_size": 18},
    "one patch": {"patch_size": 16},
    "dynamic image size": {"dynamic_img_size": True},
    "dropout": {"drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
    "dropped patches in training": {"patch_drop_rate": 0.5},
    "1 channel": {"in_chans": 1},
    "2 channels": {"in_chans": 2},
    "5 channels": {"in_chans": 5},
}

variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def pictures(vit: ViT, count: int = 3, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, vit.arch.in_channels, *vit.arch.image_size, generator=g)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float(theirs.abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@variants
@torch.no_grad()
def test_the_copy_computes_what_timm_computes(changes: dict[str, Any]) -> None:
    model = make_vit(**changes)
    vit = convert(model, "tiny")
    images = pictures(vit)
    assert_same(vit(images), model(images))


@variants
@torch.no_grad()
def test_the_order_of_patches_does_not_matter(changes: dict[str, Any]) -> None:
    vit = convert(make_vit(**changes), "tiny")
    images = pictures(vit)
    patches = patchify(images, vit.arch.grid)
    g = torch.Generator().manual_seed(2)
    order = torch.stack([torch.randperm(patches.shape[1], generator=g) for _ in images])
    shuffled = patches.gather(1, order[..., None].expand_as(patches))
    assert_same(vit.forward_sparse(shuffled, order), vit(images))


def with_tokens_removed(model: VisionTransformer, images: Tensor, keep: Tensor) -> Tensor:
    """timm's own modules on prefix tokens and the patches ``keep`` ``[B, L]``."""
    tokens = model.patch_drop(model._pos_embed(model.patch_embed(images)))
    prefix = torch.arange(model.num_prefix_tokens).expand(len(images), -1)
    index = torch.cat([prefix, keep + model.num_prefix_tokens], dim=1)
    tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    return model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))


@pytest.mark.parametrize(
    "name",
    [
        "class token",
        "average of patches",
        "average without a class token",
        "average with the prefix",
        "registers",
        "registers without position",
        "no position embedding",
        "CLIP",
        "layer scale",
        "query and key norms",
        "norm in the patch embedding",
        "rectangular image",
        "patches that leave a margin",
        "dynamic image size",
        "5 channels",
    ],
)
@torch.no_grad()
def test_absent_patches_are_tokens_removed_from_timm(name: str) -> None:
    model = make_vit(**VARIANTS[name])
    vit = convert(model, "tiny")
    images = pictures(vit)
    g = torch.Generator().manual_seed(3)
    count = vit.arch.grid.patches // 2
    keep = torch.stack([torch.randperm(vit.arch.grid.patches, generator=g)[:count] for _ in images])
    patches = patchify(images, vit.arch.grid)
    present = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
    assert_same(vit.forward_sparse(present, keep), with_tokens_removed(model, images, keep))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    keep=st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_any_set_of_patches_in_any_order(keep: list[int], seed: int) -> None:
    model = make_vit(reg_tokens=1)
    vit = convert(model, "tiny")
    images = pictures(vit, 1, seed)
    at = torch.tensor([keep])
    present = patchify(images, vit.arch.grid)[:, keep]
    assert_same(vit.forward_sparse(present, at), with_tokens_removed(model, images, at))


@torch.no_grad()
def test_positions_left_out_mean_all_in_order(tiny: VisionTransformer) -> None:
    vit = convert(tiny, "tiny")
    patches = patchify(pictures(vit), vit.arch.grid)
    at = torch.arange(16).expand(3, -1)
    assert torch.equal(vit.forward_sparse(patches), vit.forward_sparse(patches, at))


@torch.no_grad()
def test_images_of_a_batch_are_independent(tiny: VisionTransformer) -> None:
    vit = convert(tiny, "tiny")
    images = pictures(vit)
    alone = torch.cat([vit(image[None]) for image in images])
    torch.testing.assert_close(vit(images), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_batch_gives_no_logits(tiny: VisionTransformer) -> None:
    vit = convert(tiny, "tiny")
    assert vit(pictures(vit)[:0]).shape == (0, 5)


def test_the_description_holds_the_shape_of_the_model() -> None:
    model = make_vit(img_size=(12, 20), in_chans=2, reg_tokens=3, num_classes=7, mlp_ratio=1.5)
    arch = describe(model, "tiny")
    assert (arch.image_size, arch.patch_size, arch.in_channels) == ((12, 20), (4, 4), 2)
    assert (arch.embed_dim, arch.depth, arch.num_heads, arch.head_dim) == (64, 2, 2, 32)
    assert (arch.mlp_hidden, arch.num_classes, arch.num_prefix_tokens) == (96, 7, 4)


def test_a_model_without_storage_can_be_described() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert describe(model, "vit_base_patch16_224").grid.patches == 196


def test_the_copy_is_frozen_and_in_eval_mode(tiny: VisionTransformer) -> None:
    vit = convert(tiny.train(), "tiny")
    assert not any(m.training for m in vit.modules())
    assert not any(p.requires_grad for p in vit.parameters())


def test_the_copy_shares_no_memory_with_the_model(tiny: VisionTransformer) -> None:
    vit = convert(tiny, "tiny")
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())


def test_weights_of_the_model_stay_as_they_are() -> None:
    model = make_vit(init_values=0.3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    convert(model, "tiny")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_the_model_keeps_its_gradients_and_hooks(tiny: VisionTransformer) -> None:
    tiny.blocks[0].requires_grad_(False)
    before = {k: p.requires_grad for k, p in tiny.named_parameters()}
    convert(tiny, "tiny")
    assert {k: p.requires_grad for k, p in tiny.named_parameters()} == before
    assert all(p.grad is None for p in tiny.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_training_mode(tiny: VisionTransformer, training: bool) -> None:
    tiny.train(training)
    convert(tiny, "tiny")
    assert all(m.training is training for m in tiny.modules())


def test_the_model_keeps_parts_that_are_frozen_in_eval_mode(tiny: VisionTransformer) -> None:
    tiny.train()
    tiny.blocks[0].eval()
    before = {name: m.training for name, m in tiny.named_modules()}
    convert(tiny, "tiny")
    assert {name: m.training for name, m in tiny.named_modules()} == before


def test_the_model_keeps_its_training_mode_when_refused(tiny: VisionTransformer) -> None:
    tiny.norm_pre = nn.Tanh()
    tiny.train()
    with pytest.raises(UnsupportedModelError):
        convert(tiny, "tiny")
    assert all(m.training for m in tiny.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_precisions_become_float32(dtype: torch.dtype) -> None:
    model = make_vit(init_values=0.3).to(dtype)
    vit = convert(model, "tiny")
    assert {p.dtype for p in vit.parameters()} == {torch.float32}
    images = pictures(vit)
    assert_same(vit(images), model.float()(images))


def outside(name: str, **args: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, **args)

    return build


def _with_pool(model: VisionTransformer, **changes: Any) -> nn.Module:
    model.attn_pool = AttentionPoolLatent(64, num_heads=2, **changes)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "CNN": (outside("resnet18"), "ResNet"),
    "Swin": (outside("swin_tiny_patch4_window7_224"), "SwinTransformer"),
    "hybrid": (outside("vit_tiny_r_s16_p8_224"), "patch embedding"),
    "not of timm": (lambda: nn.Linear(4, 4), "Linear"),
    "wrapped": (lambda: nn.Sequential(make_vit()), "Sequential"),
    "subclass": (lambda: type("MyViT", (VisionTransformer,), {})(depth=1, embed_dim=12), "MyViT"),
    "convolutional MLP": (lambda: make_vit(mlp_layer=ConvMlp), "ConvMlp"),
    "parallel block": (lambda: make_vit(block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
    "parallel things": (lambda: make_vit(block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
    "post-norm": (lambda: make_vit(block_fn=ResPostBlock), "ResPostBlock"),
    "differential attention": (lambda: make_vit(attn_layer=DiffAttention), "DiffAttention"),
    "RMS norm": (lambda: make_vit(norm_layer=RmsNorm), "RmsNorm"),
    "RMS norm of patches": (lambda: make_vit(embed_norm_layer=RmsNorm), "RmsNorm"),
    "norms without weights": (
        lambda: make_vit(norm_layer=partial(nn.LayerNorm, elementwise_affine=False)),
        "norms",
    ),
    "largest value pooling": (lambda: make_vit(global_pool="max"), "'max'"),
    "post-norm EVA": (outside("eva02_enormous_patch14_clip_224"), "EvaBlockPostNorm"),
    "mixed rotations": (outside("vit_small_patch16_rope_mixed_224"), "rotary"),
    "two queries": (lambda: _with_pool(make_vit(global_pool="map"), latent_len=2), "one query"),
    "no pooling": (lambda: make_vit(global_pool=""), "pooling"),
    "ReLU": (lambda: make_vit(act_layer="relu"), "ReLU"),
    "padded patches": (lambda: make_vit(dynamic_img_pad=True), "patch embedding"),
}


@pytest.mark.parametrize(("build", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_other_models_are_refused_with_the_reason(
    build: Callable[[], nn.Module], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        convert(build(), "my-model")
    assert "'my-model'" in str(caught.value)


@pytest.mark.parametrize("build", [b for b, _ in REFUSED.values()], ids=REFUSED.keys())
def test_a_refusal_lists_what_works(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        convert(build(), "my-model")
    message = str(caught.value)
    assert all(known in message for known in ("ViT", "DeiT", "DINOv2", "CLIP"))


def test_a_part_that_computes_something_else_is_refused(tiny: VisionTransformer) -> None:
    tiny.norm_pre = nn.Tanh()
    with pytest.raises(UnsupportedModelError, match="Tanh"):
        convert(tiny, "tiny")


def test_blocks_of_different_widths_are_refused(tiny: Any) -> None:
    mlp = tiny.blocks[1].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(64, 32), nn.Linear(32, 64)
    with pytest.raises(UnsupportedModelError, match="blocks differ"):
        convert(tiny, "tiny")


def test_blocks_of_different_activations_are_refused(tiny: Any) -> None:
    tiny.blocks[1].mlp.act = nn.ReLU()
    with pytest.raises(UnsupportedModelError):
        convert(tiny, "tiny")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pos_embed", "blocks.1.mlp.fc2.bias", "head.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    tiny: VisionTransformer, name: str, value: float
) -> None:
    with torch.no_grad():
        tiny.get_parameter(name).flatten()[0] = value
    with pytest.raises(WeightsError, match=rf"'{name}' holds 1 NaN or infinite"):
        convert(tiny, "tiny")
