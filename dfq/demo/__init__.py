"""The demo model: a small ViT trained on Fashion-MNIST that ships inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).with_name("demo_vit.safetensors")
"""The trained weights, fp16."""

TEST_SLICE = Path(__file__).with_name("fashion_mnist_test_2k.npz")
"""The first 2,000 test images of Fashion-MNIST: ``x`` uint8 [2000, 28, 28], ``y`` uint8."""

MODEL_ARGS: dict[str, Any] = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 28,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 2,
    "mlp_ratio": 3.0,
}
"""Arguments of ``timm.create_model``: 14x14 patches of 2x2 gray pixels, 1 M parameters."""

MEAN = (0.2860,)
STD = (0.3530,)

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
