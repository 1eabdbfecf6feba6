"""The vision transformer that everything in dfq works on, with a token-sparse forward.

A timm model is converted into this form once (:mod:`dfq.vit.convert`): one linear patch
embedding, prefix tokens and position embeddings as tables, layer scale folded into the
linear layer before it, every linear layer with a bias.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.sparse import patchify
from dfq.vit.architecture import Activation, Architecture


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The nonlinearity of the MLP."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Attention(nn.Module):
    """Multi-head self-attention over tokens ``[B, T, embed_dim]``."""

    qkv: nn.Module
    proj: nn.Module

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.num_heads, self.head_dim = arch.num_heads, arch.head_dim
        self.qkv = nn.Linear(arch.embed_dim, 3 * arch.attention_dim)
        self.q_norm = _norm(arch.head_dim, arch, arch.qk_norm)
        self.k_norm = _norm(arch.head_dim, arch, arch.qk_norm)
        self.proj = nn.Linear(arch.attention_dim, arch.embed_dim)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, 3*H*D]`` to queries, keys and values ``[B, H, T, D]``."""
        b, t, _ = qkv.shape
        q, k, v = (
            qkv.reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        y: Tensor = self.proj(merge_heads(attend(q, k, v)))
        return y


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention ``[B, H, T, D]``, scaled by ``D ** -0.5``.

    Fused, except in bfloat16 on a CPU: there PyTorch's fused kernel takes three times as
    long forward and backward as the two matrix products written out (2.14, AVX-512).
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, T, D]`` to ``[B, T, H*D]``."""
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers with a nonlinearity between them."""

    fc1: nn.Module
    fc2: nn.Module

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.activation = arch.activation
        self.fc1 = nn.Linear(arch.embed_dim, arch.mlp_hidden)
        self.fc2 = nn.Linear(arch.mlp_hidden, arch.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return y


class Block(nn.Module):
    """A pre-norm transformer block."""

    attn: Attention
    mlp: Mlp

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.norm1 = _norm(arch.embed_dim, arch)
        self.attn = Attention(arch)
        self.norm2 = _norm(arch.embed_dim, arch)
        self.mlp = Mlp(arch)

    def forward(self, x: Tensor) -> Tensor:
        x = x + cast(Tensor, self.attn(self.norm1(x)))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """A vision transformer that also runs on subsets of patches.

    ``forward`` takes normalised images ``[B, C, H, W]``, ``forward_sparse`` patches
    ``[B, L, D]`` with positions ``[B, L]``; both return logits ``[B, num_classes]``
    (pooled features ``[B, embed_dim]`` where ``num_classes`` is 0).
    """

    patch_embed: nn.Module
    head: nn.Module

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        dim = arch.embed_dim
        self.patch_embed = nn.Linear(arch.grid.patch_values, dim)
        self.patch_norm = _norm(dim, arch, arch.patch_norm)
        self.prefix = nn.Parameter(torch.zeros(arch.num_prefix_tokens, dim))
        self.pos_embed = nn.Parameter(torch.zeros(arch.grid.patches, dim))
        self.norm_pre = _norm(dim, arch, arch.pre_norm)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.norm = _norm(dim, arch, arch.final_norm)
        self.fc_norm = _norm(dim, arch, arch.pooled_norm)
        self.head = nn.Linear(dim, arch.num_classes) if arch.num_classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_sparse(patchify(images, self.arch.grid))

    def forward_sparse(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of the patches present; ``positions`` may be left out for all, in order."""
        x = self.encode(self.embed(patches, positions))
        logits: Tensor = self.head(self.pool(self.norm(x)))
        return logits

    def embed(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        """Patches ``[B, L, D]`` to tokens ``[B, prefix + L, embed_dim]``."""
        pos_embed = self.pos_embed if positions is None else F.embedding(positions, self.pos_embed)
        x = self.patch_norm(self.patch_embed(patches))
        x = x + pos_embed
        x = torch.cat([self.prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        tokens: Tensor = self.norm_pre(x)
        return tokens

    def block(self, index: int) -> Block:
        """One of the blocks."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    def encode(self, x: Tensor, stop: int | None = None) -> Tensor:
        """Run the blocks before ``stop`` (all of them by default)."""
        for block in self.blocks[:stop]:
            x = block(x)
        return x

    @torch.no_grad()
    def importance(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Attention to each patch in the last block, averaged over heads: float32 ``[B, L]``.

        With a class token it is the class token's attention (arXiv 2509.23235, section 3),
        without one the mean attention of all patches.
        """
        x = self.encode(self.embed(patches, positions), stop=-1)
        block = self.block(-1)
        q, k, _ = block.attn.split(block.attn.qkv(block.norm1(x)))
        start = self.arch.num_prefix_tokens
        q = q[:, :, :1] if self.arch.class_token else q[:, :, start:]
        scores = (q.float() @ k.float().transpose(-2, -1)) * self.arch.head_dim**-0.5
        return scores.softmax(-1).mean(dim=(1, 2))[:, start:]

    def pool(self, x: Tensor) -> Tensor:
        """Normed tokens ``[B, T, embed_dim]`` to the head's input ``[B, embed_dim]``."""
        if self.arch.pool == "token":
            x = x[:, 0]
        else:
            start = 0 if self.arch.pool_includes_prefix else self.arch.num_prefix_tokens
            x = x[:, start:].mean(dim=1)
        pooled: Tensor = self.fc_norm(x)
        return pooled


def _norm(dim: int, arch: Architecture, present: bool = True) -> nn.Module:
    return nn.LayerNorm(dim, eps=arch.norm_eps) if present else nn.Identity()
