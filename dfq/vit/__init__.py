"""Vision transformers: architecture, token-sparse forward pass, and conversion of timm models."""

from dfq.vit.architecture import Architecture, Preprocessing
from dfq.vit.modules import Attention, Block, Mlp, ViT

__all__ = ["Architecture", "Attention", "Block", "Mlp", "Preprocessing", "ViT"]
