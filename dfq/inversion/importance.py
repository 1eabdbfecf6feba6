"""How much each live patch matters to the model's decision."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.vit import ViT


@torch.no_grad()
def attention_importance(vit: ViT, patches: Tensor, positions: Tensor) -> Tensor:
    """Attention to each patch in the last block, averaged over heads: float32 ``[B, L]``.

    With a class token it is the class token's attention (arXiv 2509.23235, section 3).
    Without one it is the mean attention of all patches, which is how much average
    pooling takes from each.
    """
    x = vit.encode(vit.embed(patches, positions), stop=-1)
    block = vit.block(-1)
    q, k, _ = block.attn.split(block.attn.qkv(block.norm1(x)))
    start = vit.arch.num_prefix_tokens
    q = q[:, :, :1] if vit.arch.class_token else q[:, :, start:]
    scores = (q.float() @ k.float().transpose(-2, -1)) * vit.arch.head_dim**-0.5
    return scores.softmax(-1).mean(dim=(1, 2))[:, start:]
