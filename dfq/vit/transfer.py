"""Copying of a timm model's parameters to :class:`dfq.vit.ViT`."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from dfq.vit.modules import ViT
from dfq.vit.structure import classifier


@torch.no_grad()
def transfer(model: Any, vit: ViT) -> None:
    """Fill every parameter of ``vit`` from a timm model of the same architecture."""
    _copy_embedding(model, vit)
    for name in ("norm_pre", "norm", "fc_norm"):
        _copy(getattr(vit, name), getattr(model, name, None))
    for index, theirs in enumerate(model.blocks):
        _copy_block(vit.block(index), theirs, getattr(model, "rel_pos_bias", None))
    if vit.rope is not None:
        vit.rope.copy_(_rope_table(model))
    if vit.arch.pool == "map":
        _copy_pool(vit.attn_pool, model.attn_pool)
    _copy_head(model, vit)


def _copy_embedding(model: Any, vit: Any) -> None:
    weight = model.patch_embed.proj.weight
    vit.patch_embed.weight.copy_(weight.reshape(weight.shape[0], -1))
    _copy_bias(vit.patch_embed, model.patch_embed.proj.bias)
    _copy(vit.patch_norm, model.patch_embed.norm)
    names = ("cls_token", "dist_token", "reg_token")
    parts = [getattr(model, name, None) for name in names]
    tokens = [t[0].float() for t in parts if t is not None]
    prefix = torch.cat(tokens) if tokens else weight.new_zeros(0, vit.arch.embed_dim).float()
    vit.pos_embed.zero_()
    if model.pos_embed is not None:
        pos_embed = model.pos_embed[0].float()
        if not getattr(model, "no_embed_class", False):
            prefix = prefix + pos_embed[: vit.arch.num_prefix_tokens]
            pos_embed = pos_embed[vit.arch.num_prefix_tokens :]
        vit.pos_embed.copy_(pos_embed)
    vit.prefix.copy_(prefix)


def _copy_block(ours: Any, theirs: Any, shared_bias: Any) -> None:
    _copy(ours.norm1, theirs.norm1)
    _copy(ours.norm2, theirs.norm2)
    _copy_attention(ours.attn, theirs.attn)
    if ours.attn.relative_bias is not None:
        ours.attn.relative_bias.copy_(_relative_bias(theirs.attn, shared_bias))
    _copy_mlp(ours.mlp, theirs.mlp)
    _scale(ours.attn.proj, _gamma(theirs, "ls1", "gamma_1"))
    _scale(ours.mlp.fc2, _gamma(theirs, "ls2", "gamma_2"))


def _copy_attention(ours: Any, theirs: Any) -> None:
    weight, bias = _qkv(theirs)
    order = _rotation_order(theirs)
    shape = (3, ours.num_heads, ours.head_dim)
    for target, values in ((ours.qkv.weight, weight), (ours.qkv.bias, bias)):
        parts = values.reshape(*shape, -1).clone()
        parts[:2] = parts[:2, :, order]
        target.copy_(parts.reshape(target.shape))
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(ours, name), nn.Identity):
            norm = getattr(theirs, name)
            getattr(ours, name).weight.copy_(norm.weight[order])
            bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
            getattr(ours, name).bias.copy_(bias[order])
    _copy(ours.norm, getattr(theirs, "norm", None))
    _copy(ours.proj, theirs.proj)


def _qkv(attn: Any) -> tuple[Tensor, Tensor]:
    """Return weight ``[3*H*D, C]`` and bias ``[3*H*D]`` of the three projections."""
    if attn.qkv is None:
        parts = [attn.q_proj, attn.k_proj, attn.v_proj]
        biases = [_bias_or_zeros(p.weight, p.bias) for p in parts]
        return torch.cat([p.weight for p in parts]), torch.cat(biases)
    q_bias = getattr(attn, "q_bias", None)
    if q_bias is not None:
        return attn.qkv.weight, torch.cat([q_bias, torch.zeros_like(q_bias), attn.v_bias])
    return attn.qkv.weight, _bias_or_zeros(attn.qkv.weight, attn.qkv.bias)


def _bias_or_zeros(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _rotation_order(attn: Any) -> Tensor:
    """Return the order of a head's features in which feature ``i`` pairs with ``i + D / 2``.

    timm pairs adjacent features unless ``rotate_half``.  Products of queries and keys do not
    depend on the order.
    """
    order = torch.arange(attn.proj.in_features // attn.num_heads)
    if getattr(attn, "rotate_half", True):
        return order
    return torch.cat([order[0::2], order[1::2]])


def _rope_table(model: Any) -> Tensor:
    """Return sines, then cosines of each patch, ``[N, 2 * head_dim]``."""
    rope, grid = model.rope, list(model.patch_embed.grid_size)
    cached = getattr(rope, "feat_shape", None) is not None
    table = rope.get_embed() if cached else rope.get_embed(shape=grid)
    order = _rotation_order(model.blocks[0].attn)
    return torch.cat([part[:, order] for part in table.float().chunk(2, dim=-1)], dim=1)


def _relative_bias(attn: Any, shared: Any) -> Tensor:
    tables = [m.relative_position_bias_table for m in (attn, shared) if m is not None]
    return torch.stack([t.float() for t in tables if t is not None]).sum(0)


def _copy_mlp(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, SwiGLU):
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in (theirs.fc1_g, theirs.fc1_x)]
            if parts[0] is None:
                ours.fc1.bias.zero_()
            else:
                getattr(ours.fc1, name).copy_(torch.cat(parts))
    else:
        assert isinstance(theirs, Mlp | GluMlp)
        _copy(ours.fc1, theirs.fc1)
        if getattr(theirs, "gate_last", False):
            for parameter in (ours.fc1.weight, ours.fc1.bias):
                parameter.copy_(parameter.roll(len(parameter) // 2, dims=0))
    _copy(ours.norm, theirs.norm)
    _copy(ours.fc2, theirs.fc2)


def _copy_pool(ours: Any, theirs: Any) -> None:
    query = theirs.q_norm(theirs.q(theirs.latent).reshape(theirs.num_heads, theirs.head_dim))
    ours.query.copy_(query)
    for name in ("kv", "proj", "norm"):
        _copy(getattr(ours, name), getattr(theirs, name))
    _copy_mlp(ours.mlp, theirs.mlp)


def _copy_head(model: Any, vit: Any) -> None:
    if vit.arch.pool != "distilled" or not vit.arch.num_classes:
        _copy(vit.head, classifier(model.head))
        return
    heads: Any = (classifier(model.head), classifier(model.head_dist))
    vit.head.weight.copy_(torch.cat([h.weight / 2 for h in heads], dim=1))
    vit.head.bias.copy_(sum(_bias_or_zeros(h.weight, h.bias) / 2 for h in heads))


def _copy(ours: Any, theirs: Any) -> None:
    if isinstance(ours, nn.Identity):
        return
    ours.weight.copy_(theirs.weight)
    _copy_bias(ours, theirs.bias)


def _copy_bias(ours: Any, bias: Tensor | None) -> None:
    ours.bias.zero_() if bias is None else ours.bias.copy_(bias)


def _gamma(block: Any, module: str, parameter: str) -> Tensor | None:
    """Return the layer scale, which timm keeps in a submodule or a parameter of the block."""
    gamma = getattr(getattr(block, module, None), "gamma", None)
    return gamma if gamma is not None else getattr(block, parameter, None)


def _scale(linear: Any, gamma: Tensor | None) -> None:
    if gamma is not None:
        gamma = gamma.to(linear.weight)
        linear.weight.mul_(gamma[:, None])
        linear.bias.mul_(gamma)
