"""Counted operations, and the lower bound of an iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_vit
from silent import Silent
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calibration_bench.core import registry
from calibration_bench.core.profiling import group
from calibration_bench.core.runner import run
from calibration_bench.experiments.inversion_floor.experiment import Options
from calibration_bench.measure.counting import compulsory_bytes, operations, products, unfused_bytes
from calibration_bench.measure.rates import product_seconds
from dfq import load_model
from dfq.vit import ViT


def counted(vit: ViT, live: int, batch: int, forward: Any) -> int:
    """Operations that PyTorch counts for a forward pass and the gradient of the patches."""
    vit.requires_grad_(False)
    patches = torch.randn(batch, live, vit.arch.grid.patch_values, requires_grad=True)
    positions = torch.arange(live).expand(batch, -1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(vit, patches, positions).sum().backward()
    return int(counter.get_total_flops())


def whole(vit: ViT, patches: Tensor, positions: Tensor) -> Tensor:
    return vit.classify(vit.tokens(patches, positions))


def last_row_only(vit: ViT, patches: Tensor, positions: Tensor) -> Tensor:
    """The same logits; the last block computes what the class token needs."""
    x = vit.encode(vit.embed(patches, positions), vit.position_encoding(positions), stop=-1)
    block, inner = vit.block(-1), vit.arch.attention_dim
    qkv: Any = block.attn.qkv
    normed = block.norm1(x)
    q = torch.nn.functional.linear(normed[:, :1], qkv.weight[:inner], qkv.bias[:inner])
    kv = torch.nn.functional.linear(normed, qkv.weight[inner:], qkv.bias[inner:])
    heads = [
        t.unflatten(-1, (vit.arch.num_heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1))
    ]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    y = x[:, :1] + block.attn.proj(mixed)
    y = y + block.mlp(block.norm2(y))
    logits: Tensor = vit.head(vit.pool(vit.norm(y)))
    return logits


@pytest.mark.parametrize("live", [1, 9, 16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
    ],
)
def test_operations_are_those_that_pytorch_counts(live: int, changes: dict[str, Any]) -> None:
    vit = load_model(make_vit(**changes)).vit
    needed = sum(p.operations for p in products(vit.arch, live, 3, whole_last_block=True))
    assert needed == counted(vit, live, 3, whole)
    assert (operations(vit.arch, live, 3) < needed) == (vit.arch.pooled_tokens is not None)


@pytest.mark.parametrize("live", [1, 9, 16])
def test_the_last_block_needs_the_class_token_alone(live: int) -> None:
    vit = load_model(make_vit()).vit
    patches = torch.randn(2, live, vit.arch.grid.patch_values)
    positions = torch.arange(live).expand(2, -1)
    torch.testing.assert_close(
        last_row_only(vit, patches, positions), whole(vit, patches, positions)
    )
    assert operations(vit.arch, live, 2) == counted(vit, live, 2, last_row_only)


def test_compulsory_traffic_is_the_least() -> None:
    arch = load_model(make_vit()).vit.arch
    assert compulsory_bytes(arch, 16, 1, 2) < unfused_bytes(arch, 16, 1, 2)
    assert compulsory_bytes(arch, 16, 1, 2) < compulsory_bytes(arch, 16, 2, 2)


def test_every_shape_of_product_is_multiplied() -> None:
    arch = load_model(make_vit()).vit.arch
    assert product_seconds(products(arch, 9, 2), torch.float32, 0.0) > 0


@pytest.mark.parametrize(
    ("operator", "shapes", "expected"),
    [
        ("aten::addmm", [[64], [4, 64], [64, 64]], "matmul"),
        ("aten::native_layer_norm", [[2, 5, 64]], "layer_norm"),
        ("aten::_softmax_backward_data", [[2, 2, 5, 5]], "softmax"),
        ("aten::scatter_", [[2, 16, 48]], "indexing"),
        ("aten::sub", [[2, 3, 16, 15], [2, 3, 16, 15]], "total variation"),
        ("aten::clamp", [[2, 9, 48]], "Adam"),
        ("aten::add", [[2, 10, 64], [2, 10, 64]], "elementwise in the network"),
        ("autograd::engine", [], "other"),
    ],
)
def test_operators_are_grouped(operator: str, shapes: list[list[int]], expected: str) -> None:
    grid = load_model(make_vit()).vit.arch.grid
    assert group(operator, shapes, grid, 9) == expected


def test_the_floor_is_measured(tmp_path: Path) -> None:
    options = Options(
        models="test_vit@32",
        methods="pri2",
        iterations_per_stage=3,
        warmup=1,
        seconds_per_shape=0.0,
        threads=1,
    )
    outcome = run(registry.entry("inversion-floor"), options, tmp_path, Silent())
    assert [row["live"] for row in outcome["rows"]] == [4, 2]
    for row in outcome["rows"]:
        assert row["achieved_over_possible"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["shares"]["matmul"] > 0
    (table,) = outcome["tables"]
    assert "matmul" in table["rows"][0]["where"]
