"""What a timm model is made of, or why dfq does not know it."""

from __future__ import annotations

from typing import Any

from timm.layers import GELU, GELUTanh, GluMlp, Mlp, PatchEmbed, QuickGELU, SwiGLU
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models import beit, deit, eva, vision_transformer
from torch import nn

from dfq.errors import UnsupportedModelError
from dfq.vit.architecture import Activation, Architecture, Pool

SUPPORTED = (
    "timm's vision transformers with fixed-size patches: ViT, DeiT (also distilled), DeiT-III, "
    "DINOv2, DINOv3, CLIP and SigLIP towers, BEiT, EVA-02"
)

BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.VisionTransformer: vision_transformer.Block,
    deit.VisionTransformerDistilled: vision_transformer.Block,
    beit.Beit: beit.Block,
    eva.Eva: eva.EvaBlock,
}
"""Each class of models that is known, with the one kind of blocks that it may have."""

ATTENTIONS = (Attention, beit.Attention, eva.EvaAttention, AttentionRope)
MLPS = (Mlp, GluMlp, SwiGLU)


def describe(model: Any, name: str) -> Architecture:
    """The architecture of a timm model; works on the meta device too.

    Raises:
        UnsupportedModelError: the model is not a patch ViT that dfq knows.
    """
    if type(model) not in BLOCKS:
        raise refusal(name, f"it is a {type(model).__name__}")
    embed, blocks = model.patch_embed, list(model.blocks)
    if type(embed) is not PatchEmbed or embed.img_size is None or embed.dynamic_img_pad:
        raise refusal(name, "its patch embedding is not one fixed-size convolution")
    if not isinstance(model.head, nn.Linear | nn.Identity):
        raise refusal(name, f"its head is {type(model.head).__name__}")
    _check_modules(model, name)
    for block in blocks:
        _check_block(block, BLOCKS[type(model)], name)
    attn, mlp = blocks[0].attn, blocks[0].mlp
    shapes = {(b.attn.num_heads, _head_dim(b.attn), b.mlp.fc2.in_features) for b in blocks}
    if len(shapes) != 1:
        raise refusal(name, "its blocks differ from each other")
    pool = _pool(model, name)
    return Architecture(
        image_size=_pair(embed.img_size),
        patch_size=_pair(embed.patch_size),
        in_channels=embed.proj.in_channels,
        embed_dim=model.embed_dim,
        depth=len(blocks),
        num_heads=attn.num_heads,
        head_dim=_head_dim(attn),
        mlp_hidden=mlp.fc2.in_features,
        num_classes=model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        num_prefix_tokens=model.num_prefix_tokens,
        class_token=model.cls_token is not None,
        pool=pool,
        pool_includes_prefix=(pool == "map" and isinstance(model, eva.Eva))
        or bool(getattr(model, "pool_include_prefix", False)),
        activation=_activation(mlp.act, name),
        norm_eps=_norm_eps(model, name),
        qk_norm=_has_norm(getattr(attn, "q_norm", None), name),
        patch_norm=_has_norm(embed.norm, name),
        pre_norm=_has_norm(getattr(model, "norm_pre", None), name),
        final_norm=_has_norm(model.norm, name),
        pooled_norm=_has_norm(model.fc_norm, name),
        gated_mlp=not isinstance(mlp, Mlp),
        attn_norm=_has_norm(getattr(attn, "norm", None), name),
        mlp_norm=_has_norm(mlp.norm, name),
        rope=_has_rope(model, name),
        relative_bias=_has_relative_bias(model, attn),
        **(_attention_pool(model.attn_pool, name) if pool == "map" else {}),
    )


def refusal(name: str, why: str) -> UnsupportedModelError:
    """The error for a model that dfq does not know."""
    return UnsupportedModelError(f"{name!r} cannot be quantized: {why}. Supported: {SUPPORTED}.")


def _check_modules(model: nn.Module, name: str) -> None:
    """Refuse layers whose weights do not say alone what they compute.

    Adapters, parametrizations, quantized layers of other libraries and subclasses have classes
    that are neither PyTorch's own nor timm's; a replaced ``forward`` lies in the instance.
    """
    for path, module in model.named_modules():
        kind = type(module)
        known = kind.__module__.startswith(("torch.nn.modules.", "timm."))
        linear = not isinstance(module, nn.Linear) or kind is nn.Linear
        if known and linear and "forward" not in vars(module):
            continue
        what = "has a forward of its own" if known and linear else f"is a {kind.__name__}"
        raise refusal(
            name,
            f"its layer {path or 'model'!r} {what}, and only its plain weights would be copied. "
            "Merge adapters into the weights (peft: merge_and_unload(); parametrizations: "
            "torch.nn.utils.parametrize.remove_parametrizations) and pass the plain model",
        )


def _check_block(block: Any, kind: type[nn.Module], name: str) -> None:
    if type(block) is not kind:
        raise refusal(name, f"its blocks are {type(block).__name__}")
    for norm in (block.norm1, block.norm2):
        if not isinstance(norm, nn.LayerNorm):
            raise refusal(name, f"its norms are {type(norm).__name__}")
    attn: Any = block.attn
    mlp: Any = block.mlp
    if type(attn) not in ATTENTIONS or getattr(attn, "gate", None) is not None:
        gated = " with a gate" if getattr(attn, "gate", None) is not None else ""
        raise refusal(name, f"its attention is {type(attn).__name__}{gated}")
    if getattr(attn, "num_kv_groups", 1) != 1:
        raise refusal(name, "its queries share keys (grouped-query attention)")
    if type(mlp) not in MLPS or not isinstance(mlp.fc2, nn.Linear):
        raise refusal(name, f"its MLP is {type(mlp).__name__}")


def _pool(model: Any, name: str) -> Pool:
    if isinstance(model, deit.VisionTransformerDistilled):
        return "distilled"
    if model.global_pool == "map" and getattr(model, "attn_pool", None) is not None:
        return "map"
    if getattr(model, "attn_pool", None) is not None or model.global_pool not in ("token", "avg"):
        raise refusal(name, f"its pooling is {model.global_pool!r}")
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
        raise refusal(name, "its attention pooling is not one query with an MLP")
    return {
        "pool_heads": pool.num_heads,
        "pool_hidden": pool.mlp.fc1.out_features,
        "pool_activation": _activation(pool.mlp.act, name),
    }


def _norm_eps(model: nn.Module, name: str) -> float:
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if any(m.weight is None for m in norms):
        raise refusal(name, "its norms have no weights")
    eps = {m.eps for m in norms}
    if len(eps) != 1:
        raise refusal(name, f"its norms have different epsilons ({sorted(eps)})")
    return eps.pop()


def _has_norm(norm: nn.Module | None, name: str) -> bool:
    if norm is not None and not isinstance(norm, nn.LayerNorm | nn.Identity):
        raise refusal(name, f"its norms are {type(norm).__name__}")
    return isinstance(norm, nn.LayerNorm)


def _has_rope(model: Any, name: str) -> bool:
    if getattr(model, "rope", None) is None:
        return False
    if getattr(model, "rope_mixed", False):
        raise refusal(name, "every block has rotary embeddings of its own")
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
    raise refusal(name, f"its activation is {type(act).__name__}")


def _pair(value: Any) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)


def _head_dim(attn: Any) -> int:
    return int(attn.proj.in_features // attn.num_heads)
