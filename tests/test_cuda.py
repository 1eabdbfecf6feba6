"""Verbs on a GPU; skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from exported_models import layer_scheme
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.inversion import Engine, plan_units
from dfq.inversion.runners import DeviceRunner
from dfq.quantization import rounding
from dfq.recipe import InversionSettings
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit.load import load_model

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
    assert on_gpu.backend == "float"
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    actual, expected = on_gpu(images.cuda()).cpu(), on_cpu(images)
    assert (actual - expected).norm() <= 0.02 * expected.norm()


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


def images(engine: Engine) -> list[SparseImages]:
    units = plan_units(engine.settings, engine.grid.patches)
    return [batch for unit in units for batch in engine.run(unit)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"num_classes": 1}], ids=str)
def test_graphs_give_the_bytes_of_the_same_kernels_started_by_the_host(
    precision: Any, fused: bool, changes: dict[str, int]
) -> None:
    loaded = load_model(make_vit(**changes))
    settings = InversionSettings(
        iterations=24, images=8, stages=2, unit_size=2, jitter=0.5, threads=1, precision=precision
    )
    made = []
    for graphs in (True, False):
        engine = Engine(loaded.vit, loaded.preprocessing, settings, "cuda")
        engine.runner = DeviceRunner(engine.setup, graphs=graphs, fused=fused)
        made.append(images(engine))
        assert engine.runner.fallbacks == []
        replayed = [buffers.graph is not None for buffers in engine.runner._buffers.values()]
        assert replayed == [graphs] * 2
    for x, y in zip(*made, strict=True):
        assert torch.equal(x.patches, y.patches)
        assert torch.equal(x.positions, y.positions)


def test_inversion_raises_the_target_class_on_a_gpu() -> None:
    loaded = load_model(make_vit())
    settings = InversionSettings(
        method="dmi", iterations=60, images=10, unit_size=10, threads=1, precision="float32"
    )
    (inverted,) = images(Engine(loaded.vit, loaded.preprocessing, settings, "cuda"))
    p = loaded.preprocessing
    x = pixels_to_input(inverted.patches, p, loaded.vit.arch.grid)
    probabilities = loaded.vit.forward_sparse(x, inverted.positions).softmax(-1)
    assert float(probabilities.gather(1, inverted.labels[:, None]).mean()) > 0.9


def test_gptq_on_a_gpu_gives_the_integers_of_a_cpu() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(900, 300, generator=g) @ torch.randn(300, 300, generator=g)
    weight, hessian = torch.randn(70, 300, generator=g), x.T @ x / 900
    scheme = layer_scheme(4, group=0)
    scales = rounding.search_scales(weight, scheme, hessian.diagonal())
    expected = rounding.round_gptq(weight, scales, scheme.weight, hessian)
    moved = rounding.WeightScales(scales.channel.cuda())
    actual = rounding.round_gptq(weight.cuda(), moved, scheme.weight, hessian.cuda()).cpu()
    assert float((actual == expected).double().mean()) > 0.99
