"""Verbs on a GPU; skipped without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from exported_models import checkpoint_of, layer_scheme
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

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
    assert set(on_gpu.backend.split(", ")) <= {"float", "int_mm"}
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


@pytest.fixture(params=[8, 4], ids=["w8a8", "w4a8"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return checkpoint_of(tmp_path / "q", bits=request.param)


def batch(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator).cuda()


@pytest.mark.parametrize("attention", ["float", "int8"])
def test_graphs_of_a_loaded_model_give_the_bits_of_eager_passes(
    attention: str, tmp_path: Path
) -> None:
    path = checkpoint_of(tmp_path / "q", attention=attention)
    eager = dfq.load(path, device="cuda", runtime="torch", cuda_graphs=False)
    model = dfq.load(path, device="cuda", runtime="torch")
    for seed in range(4):
        for count in (1, 3, 8):
            x = batch(count, seed)
            assert torch.equal(model(x), eager(x))
    assert model.graphs.failure is None
    assert {shape[0] for shape in model.graphs.shapes} == {1, 3, 8}
    assert eager.graphs.shapes == []


def test_integer_products_of_a_gpu_are_those_of_floating_point(checkpoint: Path) -> None:
    model = dfq.load(checkpoint, device="cuda", runtime="torch")
    x = batch(3)
    exact = model.set_backend("float")(x)
    assert torch.equal(model.set_backend("int_mm")(x), exact)


def test_results_of_replays_are_not_overwritten(checkpoint: Path) -> None:
    model = dfq.load(checkpoint, device="cuda", runtime="torch")
    inputs = [batch(4, seed) for seed in range(4)]
    found = [model(x) for x in inputs]
    model.graphs.enabled = False
    assert all(torch.equal(y, model(x)) for x, y in zip(inputs, found, strict=True))


def test_replays_on_several_streams_wait_for_each_other(checkpoint: Path) -> None:
    model = dfq.load(checkpoint, device="cuda", runtime="torch")
    inputs = [batch(8, seed) for seed in range(6)]
    expected = [model(x) for x in inputs]
    torch.cuda.synchronize()
    found = []
    for x in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(model(x))
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_inference_mode_and_gradients_share_graphs(checkpoint: Path) -> None:
    model = dfq.load(checkpoint, device="cuda", runtime="torch")
    x = batch(2)
    with torch.inference_mode():
        expected = model(x)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x.requires_grad_()), expected)
    assert model.graphs.failure is None


def test_a_compiled_model_runs_on_a_gpu(checkpoint: Path) -> None:
    eager = dfq.load(checkpoint, device="cuda", runtime="torch")
    compiled = dfq.load(checkpoint, device="cuda", runtime="torch")
    compiled.compile()
    x = batch(4)
    found = compiled(x)
    assert (found - eager(x)).norm() <= 0.02 * found.norm()
    assert compiled.graphs.shapes == []


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
