"""dfq's own vision transformer, whose forward pass takes any subset of patches.

timm models are converted to it (:mod:`dfq.vit.convert`): one linear patch embedding, prefix tokens
and position embeddings as parameters, layer scale folded into the preceding linear layer, a bias in
every linear layer.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.errors import DataError
from dfq.sparse import patchify
from dfq.vit.architecture import Activation, Architecture
from dfq.vit.position_encoding import (
    PositionEncoding,
    relative_bias_length,
    relative_position_index,
    rope_sin_cos,
)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply the nonlinearity of an MLP."""
    if activation == "silu":
        return F.silu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Attention(nn.Module):
    """Multi-head self-attention over tokens ``[B, T, embed_dim]``."""

    qkv: nn.Module
    product: nn.Module
    norm: nn.Module
    proj: nn.Module
    relative_bias: Tensor | None

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.num_heads, self.head_dim = arch.num_heads, arch.head_dim
        self.qkv = nn.Linear(arch.embed_dim, 3 * arch.attention_dim)
        self.q_norm = _norm(arch.head_dim, arch, arch.qk_norm)
        self.k_norm = _norm(arch.head_dim, arch, arch.qk_norm)
        self.product = DotProductAttention()
        self.norm = _norm(arch.attention_dim, arch, arch.attn_norm)
        self.proj = nn.Linear(arch.attention_dim, arch.embed_dim)
        self.relative_bias = None
        if arch.relative_bias:
            table = torch.zeros(relative_bias_length(arch.grid), arch.num_heads)
            self.relative_bias = nn.Parameter(table)

    def split(self, qkv: Tensor, encoding: PositionEncoding) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``[B, T, 3*H*D]`` into queries, keys and values ``[B, H, T, D]``, with norms and
        rotary embedding applied."""
        b, t, _ = qkv.shape
        q, k, v = (
            qkv.reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        return encoding.apply_rope(self.q_norm(q)), encoding.apply_rope(self.k_norm(k)), v

    def forward(
        self, x: Tensor, encoding: PositionEncoding, num_queries: int | None = None
    ) -> Tensor:
        """Return ``[B, T, embed_dim]``, or only its first ``num_queries`` tokens."""
        q, k, v = self.split(self.qkv(x), encoding)
        mixed = merge_heads(
            self.product(q[:, :, :num_queries], k, v, self.bias(encoding, num_queries))
        )
        y: Tensor = self.proj(self.norm(mixed))
        return y

    def bias(self, encoding: PositionEncoding, num_queries: int | None = None) -> Tensor | None:
        """Return the bias of the scores of the first ``num_queries`` tokens, or None."""
        bias = encoding.bias(self.relative_bias)
        return None if bias is None else bias[:, :, :num_queries]


class DotProductAttention(nn.Module):
    """Scaled dot-product attention as a module, so that hooks can observe its inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return attend(q, k, v, bias)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention of ``[B, H, T, D]``; ``scale`` is ``D ** -0.5`` by default.

    Uses PyTorch's fused kernel except in bfloat16 on CPUs, where it takes three times as long as
    two separate matrix products, forward and backward (PyTorch 2.14, AVX-512).
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        scores = (q if scale == 1 else q * scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias.to(scores.dtype)
        return scores.softmax(-1) @ v
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def merge_heads(x: Tensor) -> Tensor:
    """Concatenate heads: ``[B, H, T, D]`` to ``[B, T, H*D]``."""
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """MLP of two linear layers, optionally gated."""

    fc1: nn.Module
    norm: nn.Module
    fc2: nn.Module

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation,
        *,
        gated: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        """With ``gated``, ``fc1`` outputs ``hidden`` gates, then ``hidden`` values (arXiv
        2002.05202)."""
        super().__init__()
        self.activation, self.gated = activation, gated
        self.fc1 = nn.Linear(width, (2 if gated else 1) * hidden)
        self.norm = norm or nn.Identity()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activate(self.fc1(x)))
        return y

    def activate(self, x: Tensor) -> Tensor:
        """Map the output of ``fc1`` to the input of ``fc2``."""
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            x = activate(gate, self.activation) * value
        else:
            x = activate(x, self.activation)
        y: Tensor = self.norm(x)
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
        self.mlp = Mlp(
            arch.embed_dim,
            arch.mlp_hidden,
            arch.activation,
            gated=arch.gated_mlp,
            norm=_norm(arch.mlp_hidden, arch, arch.mlp_norm),
        )

    def forward(
        self, x: Tensor, encoding: PositionEncoding, num_queries: int | None = None
    ) -> Tensor:
        """Return ``[B, T, embed_dim]``, or only its first ``num_queries`` tokens."""
        x = x[:, :num_queries] + cast(Tensor, self.attn(self.norm1(x), encoding, num_queries))
        return x + cast(Tensor, self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """Attention pooling: one learned query over all tokens, then an MLP (arXiv 2106.04560)."""

    kv: nn.Module
    proj: nn.Module
    mlp: Mlp

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width = arch.embed_dim
        self.query = nn.Parameter(torch.zeros(arch.pool_heads, width // arch.pool_heads))
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = _norm(width, arch)
        self.mlp = Mlp(width, arch.pool_hidden, arch.pool_activation)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, keys and values ``[B, H, 1 or T, D]`` of tokens ``[B, T, C]``."""
        heads, width = self.query.shape
        kv = self.kv(x).reshape(*x.shape[:2], 2, heads, width).permute(2, 0, 3, 1, 4)
        query = self.query.to(kv.dtype)[:, None].expand(x.shape[0], -1, -1, -1)
        return query, kv[0], kv[1]

    def forward(self, x: Tensor) -> Tensor:
        """Pool tokens ``[B, T, C]`` to ``[B, C]``."""
        y: Tensor = self.proj(merge_heads(attend(*self.split(x))))
        return (y + cast(Tensor, self.mlp(self.norm(y))))[:, 0]


class ViT(nn.Module):
    """Vision transformer that also runs on subsets of patches.

    ``forward`` takes normalized images ``[B, C, H, W]``, ``forward_sparse`` patches
    ``[B, L, D]`` with positions ``[B, L]``; both return logits ``[B, num_classes]``
    (pooled features ``[B, embed_dim]`` where ``num_classes`` is 0).
    """

    patch_embed: nn.Module
    attn_pool: nn.Module
    head: nn.Module

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        dim, grid = arch.embed_dim, arch.grid
        self.patch_embed = nn.Linear(grid.patch_values, dim)
        self.patch_norm = _norm(dim, arch, arch.patch_norm)
        self.prefix = nn.Parameter(torch.zeros(arch.num_prefix_tokens, dim))
        self.pos_embed = nn.Parameter(torch.zeros(grid.patches, dim))
        self.rope: Tensor | None = None
        if arch.rope:
            self.rope = nn.Parameter(torch.zeros(grid.patches, 2 * arch.head_dim))
        self.norm_pre = _norm(dim, arch, arch.pre_norm)
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.norm = _norm(dim, arch, arch.final_norm)
        self.attn_pool = AttentionPool(arch) if arch.pool == "map" else nn.Identity()
        self.fc_norm = _norm(dim, arch, arch.pooled_norm)
        classes = arch.num_classes
        self.head = nn.Linear(arch.head_inputs, classes) if classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalized images ``[B, C, H, W]`` of the model's size.

        Raises:
            DataError: the images are of another size or type.
        """
        self.check_images(images)
        return self.forward_sparse(patchify(images, self.arch.grid))

    def check_images(self, images: Tensor) -> None:
        """Raise :class:`DataError` unless ``images`` are floating-point ``[B, C, H, W]``."""
        wanted = (self.arch.in_channels, *self.arch.image_size)
        tensor = isinstance(images, Tensor)
        if not tensor or tuple(images.shape[1:]) != wanted or not images.is_floating_point():
            got = f"{images.dtype} {list(images.shape)}" if tensor else type(images).__name__
            raise DataError(
                f"The model takes normalized images, a floating-point tensor "
                f"[B, {', '.join(map(str, wanted))}]; got {got}. Resize and normalize them as "
                "its preprocessing says."
            )

    def forward_sparse(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the logits of the given patches; without ``positions``, of all patches in order.

        If only prefix tokens are pooled, the last block computes no others.
        """
        encoding = self.position_encoding(positions)
        x = self.encode(self.embed(patches, positions), encoding, stop=-1)
        return self.classify(self.block(-1)(x, encoding, self.arch.pooled_tokens))

    def tokens(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return all tokens after the last block, ``[B, prefix + L, embed_dim]``."""
        return self.encode(self.embed(patches, positions), self.position_encoding(positions))

    def classify(self, x: Tensor) -> Tensor:
        """Return the logits of the tokens after the last block."""
        logits: Tensor = self.head(self.pool(self.norm(x)))
        return logits

    def embed(self, patches: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed patches ``[B, L, D]``: tokens ``[B, prefix + L, embed_dim]``."""
        pos_embed = self.pos_embed if positions is None else F.embedding(positions, self.pos_embed)
        x = self.patch_norm(self.patch_embed(patches))
        x = x + pos_embed
        x = torch.cat([self.prefix.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        tokens: Tensor = self.norm_pre(x)
        return tokens

    def position_encoding(self, positions: Tensor | None = None) -> PositionEncoding:
        """Return the position encoding of patches at ``positions`` ``[B, L]``."""
        if self.rope is not None:
            sin, cos = rope_sin_cos(self.rope, positions, self.arch.num_prefix_tokens)
            return PositionEncoding(sin=sin, cos=cos)
        if self.arch.relative_bias:
            return PositionEncoding(
                bias_index=relative_position_index(self.arch.grid, positions, self.prefix.device)
            )
        return PositionEncoding()

    def block(self, index: int) -> Block:
        """Return a block by its index."""
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    def encode(self, x: Tensor, encoding: PositionEncoding, stop: int | None = None) -> Tensor:
        """Run the blocks before ``stop`` (all of them by default)."""
        for block in self.blocks[:stop]:
            x = block(x, encoding)
        return x

    @torch.no_grad()
    def importance(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the attention that each patch gets, averaged over heads: float32 ``[B, L]``.

        The queries are the class token (arXiv 2509.23235, section 3) and the distillation token
        of the last block; with attention pooling, the pooling query; with average pooling, all
        patches.
        """
        encoding, start = self.position_encoding(positions), self.arch.num_prefix_tokens
        if isinstance(self.attn_pool, AttentionPool):
            x = self.norm(self.encode(self.embed(patches, positions), encoding))
            pooled = x if self.arch.pool_includes_prefix else x[:, start:]
            q, k, _ = self.attn_pool.split(pooled)
            return _attention_weights(q, k, None)[:, :, -positions.shape[1] :].mean(1)
        x = self.encode(self.embed(patches, positions), encoding, stop=-1)
        block, num_queries = self.block(-1), self.arch.pooled_tokens
        q, k, _ = block.attn.split(block.attn.qkv(block.norm1(x)), encoding)
        weights = _attention_weights(
            q[:, :, :num_queries], k, block.attn.bias(encoding, num_queries)
        )
        return weights[:, 0 if num_queries else start :, start:].mean(1)

    def pool(self, x: Tensor) -> Tensor:
        """Pool normed tokens ``[B, T, embed_dim]`` to the head's input ``[B, head_inputs]``."""
        if self.arch.pool == "token":
            x = x[:, 0]
        elif self.arch.pool == "distilled":
            x = x[:, :2].flatten(1) if self.arch.num_classes else x[:, :2].mean(dim=1)
        else:
            start = 0 if self.arch.pool_includes_prefix else self.arch.num_prefix_tokens
            x = x[:, start:]
            x = x.mean(dim=1) if self.arch.pool == "avg" else self.attn_pool(x)
        pooled: Tensor = self.fc_norm(x)
        return pooled


def _attention_weights(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return the attention weights, averaged over heads: ``[B, Tq, Tk]``."""
    scores = (q.float() @ k.float().transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias.float()).softmax(-1).mean(1)


def _norm(dim: int, arch: Architecture, present: bool = True) -> nn.Module:
    return nn.LayerNorm(dim, eps=arch.norm_eps) if present else nn.Identity()
