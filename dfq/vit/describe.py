"""Architecture of a timm model, or the reason why it is not supported."""

from __future__ import annotations

from typing import Any

from timm.layers import GELU, GELUTanh, Mlp, QuickGELU
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models import deit, eva
from torch import nn

from dfq.vit.architecture import Activation, Architecture, Pool
from dfq.vit.structure import check_kind, check_parts, classifier, unsupported


def describe(model: Any, name: str) -> Architecture:
    """Return the architecture of a timm model, which may be on the meta device.

    Raises:
        UnsupportedModelError: the model is not a patch ViT that dfq knows.
    """
    check_kind(model, name)
    embed, blocks = model.patch_embed, list(model.blocks)
    if not _is_fixed_grid(embed):
        raise unsupported(name, "its patch embedding is not one fixed-size convolution")
    rope, pool = _has_rope(model, name), _pool(model, name)
    check_parts(model, name)
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Sequential) and classifier(head) is None:
            raise unsupported(name, f"its head is {len(head)} layers, not one linear layer")
    if not _is_plain(embed):
        raise unsupported(name, "its patches overlap, or are not those of its patch size")
    if any(getattr(b.attn, "num_kv_groups", 1) != 1 for b in blocks):
        raise unsupported(name, "its queries share keys (grouped-query attention)")
    if len({_block_facts(block, name) for block in blocks}) != 1:
        raise unsupported(name, "its blocks differ from each other")
    attn, mlp = blocks[0].attn, blocks[0].mlp
    linear = classifier(model.head)
    return Architecture(
        image_size=_pair(embed.img_size),
        patch_size=_pair(embed.patch_size),
        in_channels=embed.proj.in_channels,
        embed_dim=model.embed_dim,
        depth=len(blocks),
        num_heads=attn.num_heads,
        head_dim=_head_dim(attn),
        mlp_hidden=mlp.fc2.in_features,
        num_classes=0 if linear is None else linear.out_features,
        num_prefix_tokens=model.num_prefix_tokens,
        class_token=model.cls_token is not None,
        pool=pool,
        pool_includes_prefix=(pool == "map" and isinstance(model, eva.Eva))
        or bool(getattr(model, "pool_include_prefix", False)),
        activation=_activation(mlp.act, name),
        norm_eps=_norm_eps(model, name),
        qk_norm=_has_norm(getattr(attn, "q_norm", None)),
        patch_norm=_has_norm(embed.norm),
        pre_norm=_has_norm(getattr(model, "norm_pre", None)),
        final_norm=_has_norm(model.norm),
        pooled_norm=_has_norm(model.fc_norm),
        gated_mlp=not isinstance(mlp, Mlp),
        attn_norm=_has_norm(getattr(attn, "norm", None)),
        mlp_norm=_has_norm(mlp.norm),
        rope=rope,
        relative_bias=_has_relative_bias(model, attn),
        **(_attention_pool(model.attn_pool, name) if pool == "map" else {}),
    )


def _is_fixed_grid(embed: Any) -> bool:
    return (
        hasattr(embed, "proj")
        and hasattr(embed, "norm")
        and getattr(embed, "img_size", None) is not None
        and not getattr(embed, "dynamic_img_pad", False)
    )


def _is_plain(embed: Any) -> bool:
    """Whether the convolution reads every patch of the grid exactly once."""
    conv, size = embed.proj, _pair(embed.patch_size)
    return bool(
        conv.kernel_size == conv.stride == size
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def _block_facts(block: Any, name: str) -> tuple[Any, ...]:
    """Return the properties that all blocks of a model must share."""
    attn, mlp = block.attn, block.mlp
    norms = (getattr(attn, n, None) for n in ("q_norm", "k_norm", "norm"))
    return (
        attn.num_heads,
        _head_dim(attn),
        mlp.fc2.in_features,
        isinstance(mlp, Mlp),
        _activation(mlp.act, name),
        *map(_has_norm, norms),
        _has_norm(mlp.norm),
        getattr(attn, "rotate_half", None),
        getattr(attn, "relative_position_bias_table", None) is None,
    )


def _pool(model: Any, name: str) -> Pool:
    if isinstance(model, deit.VisionTransformerDistilled):
        return "distilled"
    if model.global_pool == "map" and getattr(model, "attn_pool", None) is not None:
        return "map"
    if getattr(model, "attn_pool", None) is not None or model.global_pool not in ("token", "avg"):
        raise unsupported(name, f"its pooling is {model.global_pool!r}")
    return "token" if model.global_pool == "token" else "avg"


def _attention_pool(pool: Any, name: str) -> dict[str, Any]:
    known = (
        type(pool) is AttentionPoolLatent
        and pool.latent_len == 1
        and pool.pos_embed is None
        and type(pool.mlp) is Mlp
        and isinstance(pool.proj, nn.Linear)
        and isinstance(pool.norm, nn.LayerNorm)
        and isinstance(pool.k_norm, nn.Identity)
        and isinstance(pool.mlp.norm, nn.Identity)
        and pool.num_heads * pool.head_dim == pool.proj.out_features == pool.kv.in_features
    )
    if not known:
        raise unsupported(name, "its attention pooling is not one query with an MLP")
    return {
        "pool_heads": pool.num_heads,
        "pool_hidden": pool.mlp.fc1.out_features,
        "pool_activation": _activation(pool.mlp.act, name),
    }


def _norm_eps(model: nn.Module, name: str) -> float:
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if any(m.weight is None for m in norms):
        raise unsupported(name, "its norms have no weights")
    eps = {m.eps for m in norms}
    if len(eps) != 1:
        raise unsupported(name, f"its norms have different epsilons ({sorted(eps)})")
    return eps.pop()


def _has_norm(norm: nn.Module | None) -> bool:
    return isinstance(norm, nn.LayerNorm)


def _has_rope(model: Any, name: str) -> bool:
    if getattr(model, "rope", None) is None:
        return False
    if getattr(model, "rope_mixed", False):
        raise unsupported(name, "every block has rotary embeddings of its own")
    return True


def _has_relative_bias(model: Any, attn: Any) -> bool:
    shared = getattr(model, "rel_pos_bias", None) is not None
    return shared or getattr(attn, "relative_position_bias_table", None) is not None


def _activation(act: Any, name: str) -> Activation:
    if isinstance(act, nn.SiLU):
        return "silu"
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if isinstance(act, GELU):
        return "gelu"
    if isinstance(act, GELUTanh):
        return "gelu_tanh"
    if isinstance(act, QuickGELU):
        return "quick_gelu"
    raise unsupported(name, f"its activation is {type(act).__name__}")


def _pair(value: Any) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)


def _head_dim(attn: Any) -> int:
    return int(attn.proj.in_features // attn.num_heads)
