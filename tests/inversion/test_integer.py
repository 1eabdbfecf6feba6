"""Inversion with products of 8-bit integers against floating point."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_vit
from torch import Tensor, nn

from dfq import device
from dfq.device import (
    LARGEST_WEIGHT,
    compute_dtype,
    int8_is_exact,
    resolve_precision,
    resolve_products,
)
from dfq.errors import DeviceError
from dfq.inversion import Engine, integer, integer_block, plan_units
from dfq.inversion.integer import IntegerProduct
from dfq.inversion.integer_block import IntegerBlock, multiply_integers
from dfq.recipe import InversionSettings
from dfq.vit import ViT
from dfq.vit.load import LoadedModel, load_model
from dfq.vit.modules import attend, merge_heads

CPU = torch.device("cpu")


def where_exact(largest: int) -> pytest.MarkDecorator:
    reason = f"products with weights up to {largest} are not exact here"
    return pytest.mark.skipif(not int8_is_exact(CPU, largest), reason=reason)


BITS_8, BITS_7 = LARGEST_WEIGHT["int8"], LARGEST_WEIGHT["int7"]
RANGES = [pytest.param(largest, marks=where_exact(largest)) for largest in (BITS_8, BITS_7)]
INTEGERS = [pytest.param(name, marks=where_exact(LARGEST_WEIGHT[name])) for name in LARGEST_WEIGHT]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


@pytest.mark.parametrize("largest", RANGES)
@pytest.mark.parametrize("sign", [1, -1])
def test_products_are_exact_forward_and_backward(largest: int, sign: int) -> None:
    """Those of inputs and weights that are integers already, among them the most extreme."""
    generator = seeded(0)
    x, upstream = (torch.randint(-127, 128, (9, n), generator=generator) for n in (200, 120))
    weight = torch.randint(-largest, largest + 1, (120, 200), generator=generator)
    x[0], upstream[0], weight[0], weight[:, 0] = sign * 127, sign * 127, largest, largest
    x[1:, 0] = upstream[1:, 0] = 127
    linear = nn.Linear(200, 120, dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(weight)
    linear.bias.copy_(torch.arange(120))
    leaf = x.float().requires_grad_()
    y = IntegerProduct(linear, largest)(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, upstream.float())
    assert torch.equal(y.double(), linear(x.double()))
    assert torch.equal(gradient.double(), upstream.double() @ linear.weight)


@pytest.mark.parametrize("largest", RANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 17, 48), (1, 1, 48), (5, 48)])
def test_output_and_input_gradient_are_near_those_of_a_linear_layer(
    dtype: torch.dtype, shape: tuple[int, ...], largest: int
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).to(dtype).requires_grad_(False)
    x = normal(*shape).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = IntegerProduct(linear, largest)(ours), linear(theirs)
    assert y.dtype == dtype
    upstream = normal(*y.shape, seed=2).to(dtype)
    y.backward(upstream)
    expected.backward(upstream)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert relative(y, expected) < 0.02
    assert relative(ours.grad, theirs.grad) < 0.02


@pytest.mark.parametrize("largest", RANGES)
def test_rows_of_any_size_keep_their_precision(largest: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).requires_grad_(False)
    linear.bias.zero_()
    x = normal(4, 48) * torch.tensor([1e-9, 1.0, 1e6, 0.0])[:, None]
    leaf = x.clone().requires_grad_()
    upstream = normal(4, 80, seed=1) * torch.tensor([1e6, 1e-9, 0.0, 1.0])[:, None]
    y = IntegerProduct(linear, largest)(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    for row in range(3):
        assert relative(y[row], x[row] @ linear.weight.T) < 0.02
    assert not y[3].any()
    for row in (0, 1, 3):
        assert relative(gradient[row], upstream[row] @ linear.weight) < 0.02
    assert not gradient[2].any()


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model(make_vit(depth=3))


@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_gradients_of_a_model_with_wide_channels_stay_near(
    loaded: LoadedModel, spread: float, precision: str
) -> None:
    vit: Any = copy.deepcopy(loaded.vit).requires_grad_(False)
    for block in vit.blocks:
        factor = spread ** (2 * torch.rand(64, generator=torch.Generator().manual_seed(3)) - 1)
        block.norm1.weight.mul_(factor)
        block.norm1.bias.mul_(factor)
        block.attn.qkv.weight.div_(factor)
    patches = normal(2, vit.arch.grid.patches, vit.arch.grid.patch_values)

    def gradient(model: ViT) -> Tensor:
        leaf = patches.clone().requires_grad_()
        score = model.forward_sparse(leaf).square().sum()
        return torch.autograd.grad(score, leaf)[0]

    expected = gradient(vit)
    multiply_integers(vit, precision)
    assert sum(isinstance(m, IntegerProduct) for m in vit.modules()) == 4 * vit.arch.depth
    actual = gradient(vit)
    assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("integers", INTEGERS)
def test_images_are_the_same_every_time_and_end_as_low_as_with_floats(
    loaded: LoadedModel, integers: Any
) -> None:
    losses: dict[str, float] = {}
    for precision in ("float32", integers):
        settings = InversionSettings(
            method="dmi", iterations=24, images=4, precision=precision, threads=1
        )
        (unit,) = plan_units(settings, loaded.vit.arch.grid.patches)
        first, again = (
            Engine(loaded.vit, loaded.preprocessing, settings).run(unit)[0] for _ in range(2)
        )
        assert torch.equal(first.patches, again.patches)
        x = (first.patches.float() / 255 - 0.5) / 0.5
        losses[precision] = float(
            torch.nn.functional.cross_entropy(loaded.vit.forward_sparse(x), first.labels).detach()
        )
    assert losses[integers] < 1.2 * losses["float32"] + 0.05


FAMILIES: dict[str, dict[str, Any]] = {
    "class token": {},
    "averaged": {"global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "gelu by tanh": {"act_layer": "gelu_tanh"},
    "pooled by attention": {"class_token": False, "global_pool": "map"},
}


def of_model(model: ViT, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, gradient and importance of random patches."""
    grid = model.arch.grid
    chosen = [torch.randperm(grid.patches, generator=seeded(i))[:tokens] for i in range(3)]
    positions = torch.stack(chosen)
    leaf = normal(3, tokens, grid.patch_values).requires_grad_()
    y = model.forward_sparse(leaf, positions)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
    return y.detach(), gradient, model.importance(leaf, positions)


@where_exact(BITS_7)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_as_one_function_is_as_near_as_its_products_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit: Any = load_model(make_vit(**FAMILIES[family])).vit.requires_grad_(False)
    whole: Any = copy.deepcopy(vit)
    parts = copy.deepcopy(vit)
    multiply_integers(whole, "int7")
    assert all(isinstance(block, IntegerBlock) for block in whole.blocks)
    monkeypatch.setattr(integer_block, "fits", lambda _: False)
    multiply_integers(parts, "int7")
    for found, alone, floats in zip(of_model(whole), of_model(parts), of_model(vit), strict=True):
        assert relative(found, floats) < 1.25 * relative(alone, floats) < 0.08


def multiply_floats(x: Tensor, weight: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """As ``multiply``, without rounding."""
    scale = 1 + x.abs().amax(-1, keepdim=True)
    y = x / scale @ weight.T
    if overwrite:
        x.fill_(torch.nan)
    return y, scale


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_as_one_function_has_the_gradient_of_autograd(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer, "pack", lambda weight, _: weight)
    for module in (integer, integer_block):
        monkeypatch.setattr(module, "multiply", multiply_floats)
    vit: Any = load_model(make_vit(**FAMILIES[family])).vit.requires_grad_(False)
    whole = copy.deepcopy(vit)
    multiply_integers(whole, "int7")
    for found, expected in zip(of_model(whole), of_model(vit), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_more_parts_stay_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vit: Any = load_model(make_vit(qk_norm=True)).vit.requires_grad_(False)
    expected = of_model(vit)
    monkeypatch.setattr(integer, "pack", lambda weight, _: weight)
    for module in (integer, integer_block):
        monkeypatch.setattr(module, "multiply", multiply_floats)
    multiply_integers(vit, "int7")
    assert not any(isinstance(block, IntegerBlock) for block in vit.blocks)
    for found, exact in zip(of_model(vit), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_and_its_gradient_are_those_of_autograd(bias: bool, heads: int) -> None:
    qkv, upstream = normal(2, 7, 3 * 24).double(), normal(2, 7, 24, seed=1).double()
    table = normal(1, heads, 7, 7, seed=2).double() if bias else None
    found, *parts = integer_block._attend(qkv.clone(), heads, table)
    gradient = integer_block._attend_backward(upstream, *parts)
    leaf = qkv.requires_grad_()
    q, k, v = leaf.view(2, 7, 3, heads, -1).permute(2, 0, 3, 1, 4)
    expected = merge_heads(attend(q, k, v, table))
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf, upstream)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_attention_of_few_tokens_needs_no_keys_and_values(bias: bool) -> None:
    torch.manual_seed(0)
    qkv, x = nn.Linear(20, 3 * 24).double(), normal(2, 7, 20).double()
    table = normal(1, 3, 2, 7, seed=2).double() if bias else None
    q, k, v = qkv(x).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = merge_heads(attend(q[:, :, :2], k, v, table))
    torch.testing.assert_close(integer_block.attend_few(x, qkv, 3, 2, table), expected)


def test_the_rest_is_in_floating_point() -> None:
    assert str(compute_dtype("int8", CPU)) == f"torch.{resolve_precision('auto', CPU)}"
    assert compute_dtype("int7", CPU) == compute_dtype("float32", CPU) == torch.float32


def test_devices_without_8_bit_products_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"takes an x86 processor.*VNNI.*'cuda' here"):
        resolve_products("int8", torch.device("cuda"))
    with pytest.raises(DeviceError, match=r"'int7'.* an x86 processor with AVX2, not 'cuda' here"):
        resolve_products("int7", torch.device("cuda"))


@pytest.mark.parametrize(
    ("largest", "bfloat16", "chosen"),
    [
        pytest.param(127, True, "bfloat16", id="VNNI and bfloat16"),
        pytest.param(64, True, "bfloat16", id="bfloat16 alone"),
        pytest.param(127, False, "float32", id="VNNI alone"),
        pytest.param(64, False, "float32", id="AVX2 alone"),
        pytest.param(0, False, "float32", id="neither"),
    ],
)
def test_auto_goes_by_what_the_processor_does(
    largest: int, bfloat16: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_worst_product_is_exact", lambda wanted: wanted <= largest)
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: bfloat16)
    assert resolve_products("auto", CPU) == chosen
    assert resolve_products("float32", CPU) == "float32"
    assert resolve_precision("auto", CPU) == ("bfloat16" if bfloat16 else "float32")
    gpu = torch.device("cuda")
    assert resolve_products("auto", gpu) == resolve_precision("auto", gpu)
