"""The same verbs on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import dfq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SETTINGS = {"inversion": {"unit_size": 2}}


def test_a_checkpoint_made_on_a_gpu_runs_everywhere(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    result = dfq.quantize(
        tiny, images=8, iterations=8, stages=2, settings=SETTINGS, device="cuda", out=tmp_path / "q"
    )
    on_gpu = dfq.load(result.checkpoint, device="cuda")
    on_cpu = dfq.load(result.checkpoint).set_backend("reference")
    assert on_gpu.backend == "reference"
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, expected = on_gpu(images.cuda()).cpu(), on_cpu(images)
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_images_made_on_a_gpu_have_the_places_of_their_kind(
    tmp_path: Path, tiny: VisionTransformer
) -> None:
    result = dfq.invert(
        tiny, images=8, iterations=8, stages=2, device="cuda", out=tmp_path / "images"
    )
    dataset = dfq.SparseImageDataset(result.path)
    dataset.verify()
    assert len(dataset) == 8
    assert str(dataset.settings["machine"]).startswith("cuda")
