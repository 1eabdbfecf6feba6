"""timm's VisionTransformer -> :class:`dfq.vit.ViT`, checked by comparing their outputs."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GELU, Attention, GELUTanh, LayerScale, Mlp, PatchEmbed, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dfq.errors import UnsupportedModelError, WeightsError
from dfq.vit.architecture import Activation, Architecture
from dfq.vit.modules import ViT

SUPPORTED = (
    "timm's VisionTransformer with fixed-size square or rectangular patches: ViT, DeiT, DeiT-III, "
    "DINOv2 (with GELU MLP, with or without registers), CLIP towers; class token or average pooling"
)

TOLERANCE = 2e-3
"""Largest accepted difference of the logits from timm's, relative to their largest magnitude."""


def convert(model: nn.Module, name: str) -> ViT:
    """Copy a timm model's weights into a float32 :class:`ViT` in eval mode.

    The model is left as it is.  The copy is compared with it on one random image, so
    that a variant that dfq does not know is refused and never silently wrong.

    Raises:
        UnsupportedModelError: the model is not a patch ViT that dfq knows.
        WeightsError: a weight is NaN or infinite.
    """
    arch = describe(model, name)
    check_finite(model.state_dict())
    with torch.device("meta"):
        vit = ViT(arch)
    vit.to_empty(device="cpu")
    with torch.no_grad():
        vit.pos_embed.zero_()
        _copy(model, vit)
    vit.eval().requires_grad_(False)
    _compare(model, vit, name)
    return vit


def check_finite(state: dict[str, Any]) -> None:
    """Raise :class:`WeightsError` if a floating-point tensor holds NaN or infinity."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.device.type != "meta":
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise WeightsError(
                    f"Weight {key!r} holds {bad} NaN or infinite values of {value.numel()}. "
                    "Use weights from a training run that did not diverge."
                )


def describe(model: Any, name: str) -> Architecture:
    """What a timm model is made of; works on the meta device too.

    Raises:
        UnsupportedModelError: the model is not a patch ViT that dfq knows.
    """
    if type(model) is not VisionTransformer:
        raise _refusal(name, f"it is a {type(model).__name__}")
    embed, blocks = model.patch_embed, list(model.blocks)
    if type(embed) is not PatchEmbed or embed.img_size is None or embed.dynamic_img_pad:
        raise _refusal(name, "its patch embedding is not one fixed-size convolution")
    if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
        raise _refusal(name, f"its pooling is {model.global_pool!r}")
    if not isinstance(model.head, nn.Linear | nn.Identity):
        raise _refusal(name, f"its head is {type(model.head).__name__}")
    for block in blocks:
        _check_block(block, name)
    attn, mlp = blocks[0].attn, blocks[0].mlp
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if any(m.weight is None for m in norms):
        raise _refusal(name, "its norms have no weights")
    for norm in (embed.norm, model.norm_pre, model.norm, model.fc_norm):
        _check_norm(norm, name)
    eps = {m.eps for m in norms}
    hidden = {block.mlp.fc1.out_features for block in blocks}
    if len(eps) != 1 or len(hidden) != 1:
        raise _refusal(name, "its blocks differ from each other")
    return Architecture(
        image_size=_pair(embed.img_size),
        patch_size=_pair(embed.patch_size),
        in_channels=embed.proj.in_channels,
        embed_dim=model.embed_dim,
        depth=len(blocks),
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        mlp_hidden=mlp.fc1.out_features,
        num_classes=model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        num_prefix_tokens=model.num_prefix_tokens,
        class_token=model.cls_token is not None,
        pool="token" if model.global_pool == "token" else "avg",
        pool_includes_prefix=bool(model.pool_include_prefix),
        activation=_activation(mlp.act, name),
        norm_eps=eps.pop(),
        qk_norm=isinstance(attn.q_norm, nn.LayerNorm),
        patch_norm=isinstance(embed.norm, nn.LayerNorm),
        pre_norm=isinstance(model.norm_pre, nn.LayerNorm),
        final_norm=isinstance(model.norm, nn.LayerNorm),
        pooled_norm=isinstance(model.fc_norm, nn.LayerNorm),
    )


def _check_block(block: Any, name: str) -> None:
    if type(block) is not Block:
        raise _refusal(name, f"its blocks are {type(block).__name__}")
    if type(block.attn) is not Attention or getattr(block.attn, "gate", None) is not None:
        raise _refusal(name, f"its attention is {type(block.attn).__name__}")
    if not isinstance(block.attn.norm, nn.Identity):
        raise _refusal(name, "it normalises attention outputs")
    if type(block.mlp) is not Mlp or not isinstance(block.mlp.fc1, nn.Linear):
        raise _refusal(name, f"its MLP is {type(block.mlp).__name__}")
    if not isinstance(block.mlp.norm, nn.Identity):
        raise _refusal(name, "it normalises inside its MLP")
    for norm in (block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm):
        _check_norm(norm, name)


def _check_norm(norm: nn.Module, name: str) -> None:
    if not isinstance(norm, nn.LayerNorm | nn.Identity):
        raise _refusal(name, f"its norms are {type(norm).__name__}")


def _activation(act: Any, name: str) -> Activation:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if isinstance(act, GELU):
        return "gelu"
    if isinstance(act, GELUTanh):
        return "gelu_tanh"
    if isinstance(act, QuickGELU):
        return "quick_gelu"
    raise _refusal(name, f"its activation is {type(act).__name__}")


def _pair(value: Any) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)


def _refusal(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name!r} cannot be quantized: {why}. Supported: {SUPPORTED}.")


def _copy(model: Any, vit: Any) -> None:
    arch = vit.arch
    weight = model.patch_embed.proj.weight
    vit.patch_embed.weight.copy_(weight.reshape(weight.shape[0], -1))
    _copy_bias(vit.patch_embed, model.patch_embed.proj.bias)
    vit.patch_norm.load_state_dict(model.patch_embed.norm.state_dict())

    parts = [t[0].float() for t in (model.cls_token, model.reg_token) if t is not None]
    prefix = torch.cat(parts) if parts else weight.new_zeros(0, arch.embed_dim).float()
    if model.pos_embed is not None:
        pos_embed = model.pos_embed[0].float()
        if not model.no_embed_class:
            prefix = prefix + pos_embed[: arch.num_prefix_tokens]
            pos_embed = pos_embed[arch.num_prefix_tokens :]
        vit.pos_embed.copy_(pos_embed)
    vit.prefix.copy_(prefix)

    for name in ("norm_pre", "norm", "fc_norm", "head"):
        _copy_module(getattr(vit, name), getattr(model, name))
    for i, theirs in enumerate(model.blocks):
        ours = vit.block(i)
        for name in ("norm1", "norm2"):
            _copy_module(getattr(ours, name), getattr(theirs, name))
        for name in ("qkv", "q_norm", "k_norm"):
            _copy_module(getattr(ours.attn, name), getattr(theirs.attn, name))
        _copy_module(ours.mlp.fc1, theirs.mlp.fc1)
        _copy_scaled(ours.attn.proj, theirs.attn.proj, theirs.ls1)
        _copy_scaled(ours.mlp.fc2, theirs.mlp.fc2, theirs.ls2)


def _copy_module(ours: Any, theirs: Any) -> None:
    if isinstance(ours, nn.Identity):
        return
    ours.weight.copy_(theirs.weight)
    _copy_bias(ours, theirs.bias)


def _copy_bias(ours: Any, bias: Tensor | None) -> None:
    ours.bias.zero_() if bias is None else ours.bias.copy_(bias)


def _copy_scaled(ours: Any, theirs: Any, layer_scale: Any) -> None:
    _copy_module(ours, theirs)
    if isinstance(layer_scale, LayerScale):
        ours.weight.mul_(layer_scale.gamma.float()[:, None])
        ours.bias.mul_(layer_scale.gamma.float())


def _compare(model: nn.Module, vit: ViT, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    arch = vit.arch
    image = torch.randn(1, arch.in_channels, *arch.image_size, generator=generator)
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    try:
        with torch.inference_mode():
            theirs = model.eval()(image.to(parameter)).float().cpu()
            ours = vit(image)
    finally:
        for module, training in modes.items():
            module.training = training
    tolerance = TOLERANCE if parameter.dtype == torch.float32 else 0.1
    worst = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if not worst <= tolerance:
        raise _refusal(name, f"its output differs from what its parts compute (by {worst:.2g})")
