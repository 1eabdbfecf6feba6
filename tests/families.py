"""A small randomly initialized member of every family of models that dfq knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, QuickGELU
from timm.layers.mlp import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@dataclass(frozen=True)
class Family:
    """``examples`` are timm's names, ``scheme`` how tokens know where they are."""

    name: str
    examples: str
    scheme: str
    pooling: str
    make: Callable[..., nn.Module]


SIZES: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "num_classes": 5,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 2,
}


def build(kind: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    """A model of spread activations; nothing that a test could miss stays zero."""
    return spread_out(partial(kind, **{**SIZES, **changes}))


def spread_out(make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` returns, with weights that make its logits differ between images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def family(
    name: str,
    examples: str,
    scheme: str,
    pooling: str,
    kind: Callable[..., nn.Module],
    **changes: Any,
) -> Family:
    def make(**more: Any) -> nn.Module:
        return build(kind, **{**changes, **more})

    return Family(name, examples, scheme, pooling, make)


ABSOLUTE, ROTARY = "absolute", "rotary"
CLASS, MEAN, QUERY = "class token", "mean", "attention of a query"
NO_CLASS_TOKEN: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
EVA02: dict[str, Any] = {
    "qkv_fused": False,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "use_rot_pos_emb": True,
    "ref_feat_shape": (4, 4),
}
DINOV3: dict[str, Any] = {
    "rope_type": "dinov3",
    "dynamic_img_size": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "rope_rotate_half": True,
    "num_reg_tokens": 4,
    "init_values": 0.5,
    "use_fc_norm": False,
    "norm_layer": lambda width, **kwargs: nn.LayerNorm(width, **{**kwargs, "eps": 1e-5}),
}

FAMILIES = [
    family(
        "ViT, DeiT",
        "vit_base_patch16_224, deit_small_patch16_224",
        ABSOLUTE,
        CLASS,
        VisionTransformer,
    ),
    family(
        "DeiT, distilled",
        "deit_base_distilled_patch16_224",
        ABSOLUTE,
        "class and distillation tokens",
        VisionTransformerDistilled,
    ),
    family(
        "DeiT-III",
        "deit3_base_patch16_224",
        ABSOLUTE,
        CLASS,
        VisionTransformer,
        no_embed_class=True,
        init_values=0.5,
    ),
    family(
        "ViT, average-pooled",
        "vit_base_patch16_siglip_gap_224",
        ABSOLUTE,
        MEAN,
        VisionTransformer,
        **NO_CLASS_TOKEN,
    ),
    family(
        "DINOv2", "vit_small_patch14_dinov2", ABSOLUTE, CLASS, VisionTransformer, init_values=0.5
    ),
    family(
        "DINOv2 with registers",
        "vit_small_patch14_reg4_dinov2",
        ABSOLUTE,
        CLASS,
        VisionTransformer,
        init_values=0.5,
        reg_tokens=4,
        no_embed_class=True,
    ),
    family(
        "DINOv2, giant",
        "vit_giant_patch14_dinov2",
        ABSOLUTE,
        CLASS,
        VisionTransformer,
        init_values=0.5,
        mlp_layer=SwiGLUPacked,
        act_layer=nn.SiLU,
        mlp_ratio=4,
    ),
    family(
        "CLIP towers",
        "vit_base_patch16_clip_224, vit_base_patch16_clip_quickgelu_224",
        ABSOLUTE,
        CLASS,
        VisionTransformer,
        pre_norm=True,
        act_layer=QuickGELU,
    ),
    family(
        "SigLIP towers",
        "vit_base_patch16_siglip_224",
        ABSOLUTE,
        QUERY,
        VisionTransformer,
        class_token=False,
        global_pool="map",
    ),
    family(
        "BEiT, BEiTv2",
        "beit_base_patch16_224, beitv2_base_patch16_224",
        "bias by relative position",
        MEAN,
        Beit,
        init_values=0.5,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        qkv_bias=True,
    ),
    family("EVA", "eva_large_patch14_196", ABSOLUTE, MEAN, Eva, global_pool="avg"),
    family("EVA-02", "eva02_base_patch14_448", "absolute and rotary", MEAN, Eva, **EVA02),
    family("DINOv3", "vit_small_patch16_dinov3", ROTARY, MEAN, Eva, global_pool="avg", **DINOV3),
    family(
        "DINOv3, SwiGLU",
        "vit_huge_plus_patch16_dinov3",
        ROTARY,
        MEAN,
        Eva,
        global_pool="avg",
        swiglu_mlp=True,
        swiglu_align_to=8,
        **DINOV3,
    ),
    family(
        "Perception Encoder",
        "vit_pe_core_base_patch16_224",
        "absolute and rotary",
        QUERY,
        Eva,
        global_pool="map",
        attn_type="rope",
        use_pre_transformer_norm=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(4, 4),
        rope_grid_offset=1.0,
        rope_grid_indexing="xy",
        use_fc_norm=False,
    ),
]

VARIANTS = [
    family("one channel", "", ABSOLUTE, CLASS, VisionTransformer, in_chans=1),
    family("five channels", "", ABSOLUTE, CLASS, VisionTransformer, in_chans=5),
    family(
        "rectangles", "", ABSOLUTE, CLASS, VisionTransformer, img_size=(12, 20), patch_size=(3, 5)
    ),
    family(
        "rectangular BEiT",
        "",
        "bias by relative position",
        CLASS,
        Beit,
        img_size=(8, 20),
        use_shared_rel_pos_bias=True,
        use_rel_pos_bias=True,
        global_pool="token",
    ),
    family(
        "shared bias only",
        "",
        "bias by relative position",
        MEAN,
        Beit,
        use_shared_rel_pos_bias=True,
        use_abs_pos_emb=True,
    ),
    family(
        "rectangular EVA-02",
        "",
        "absolute and rotary",
        CLASS,
        Eva,
        img_size=(8, 20),
        global_pool="token",
        **EVA02,
    ),
    family(
        "gate last", "", ABSOLUTE, CLASS, VisionTransformer, mlp_layer=GluMlp, act_layer=nn.SiLU
    ),
    family(
        "inner norms",
        "",
        ABSOLUTE,
        CLASS,
        Eva,
        global_pool="token",
        scale_attn_inner=True,
        qk_norm=True,
        use_rot_pos_emb=True,
    ),
    family("normed queries", "", ABSOLUTE, CLASS, VisionTransformer, qk_norm=True),
    family(
        "scaled inside",
        "",
        ABSOLUTE,
        CLASS,
        VisionTransformer,
        scale_attn_norm=True,
        scale_mlp_norm=True,
    ),
    family("backbone", "", ABSOLUTE, CLASS, VisionTransformer, num_classes=0),
    family(
        "distilled backbone",
        "",
        ABSOLUTE,
        "class and distillation tokens",
        VisionTransformerDistilled,
        num_classes=0,
    ),
    family(
        "SigLIP backbone",
        "",
        ABSOLUTE,
        QUERY,
        VisionTransformer,
        class_token=False,
        global_pool="map",
        num_classes=0,
    ),
]


def table() -> str:
    """The families as Markdown."""
    lines = [
        "| family | timm's names, for example | positions | pooled by |",
        "|---|---|---|---|",
        *(
            f"| {f.name} | {', '.join(f'`{e}`' for e in f.examples.split(', '))} "
            f"| {f.scheme} | {f.pooling} |"
            for f in FAMILIES
        ),
    ]
    return "\n".join(lines) + "\n"
