"""Vision transformers: their description, their token-sparse forward, and timm's models."""

from dfq.vit.architecture import Architecture, Preprocessing
from dfq.vit.modules import Attention, Block, Mlp, ViT

__all__ = ["Architecture", "Attention", "Block", "Mlp", "Preprocessing", "ViT"]
