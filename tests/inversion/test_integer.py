"""Inversion with products of 8-bit integers against floating point."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import make_vit
from torch import Tensor, nn

from dfq.device import compute_dtype, int8_is_exact, resolve_precision
from dfq.errors import DeviceError
from dfq.inversion import Engine, plan_units
from dfq.inversion.integer import IntegerProduct, multiply_integers
from dfq.recipe import InversionSettings
from dfq.vit import ViT
from dfq.vit.load import LoadedModel, load_model

multiplies = pytest.mark.skipif(
    not int8_is_exact(torch.device("cpu")), reason="this processor has no 8-bit dot products"
)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@multiplies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 17, 48), (1, 1, 48), (5, 48)])
def test_output_and_input_gradient_are_near_those_of_a_linear_layer(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).to(dtype).requires_grad_(False)
    x = normal(*shape).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = IntegerProduct(linear)(ours), linear(theirs)
    assert y.dtype == dtype
    upstream = normal(*y.shape, seed=2).to(dtype)
    y.backward(upstream)
    expected.backward(upstream)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert relative(y, expected) < 0.02
    assert relative(ours.grad, theirs.grad) < 0.02


@multiplies
def test_rows_of_any_size_keep_their_precision() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80).requires_grad_(False)
    linear.bias.zero_()
    x = normal(4, 48) * torch.tensor([1e-9, 1.0, 1e6, 0.0])[:, None]
    leaf = x.clone().requires_grad_()
    upstream = normal(4, 80, seed=1) * torch.tensor([1e6, 1e-9, 0.0, 1.0])[:, None]
    y = IntegerProduct(linear)(leaf)
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


@multiplies
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_gradients_of_a_model_with_wide_channels_stay_near(
    loaded: LoadedModel, spread: float
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
    multiply_integers(vit)
    assert sum(isinstance(m, IntegerProduct) for m in vit.modules()) == 4 * vit.arch.depth
    actual = gradient(vit)
    assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99


@multiplies
def test_images_are_the_same_every_time_and_end_as_low_as_with_floats(loaded: LoadedModel) -> None:
    losses: dict[str, float] = {}
    for precision in ("float32", "int8"):
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
    assert losses["int8"] < 1.2 * losses["float32"] + 0.05


def test_the_rest_is_in_floating_point() -> None:
    cpu = torch.device("cpu")
    assert str(compute_dtype("int8", cpu)) == f"torch.{resolve_precision('auto', cpu)}"
    assert compute_dtype("float32", cpu) == torch.float32


def test_devices_without_8_bit_products_are_refused() -> None:
    with pytest.raises(DeviceError, match=r"takes an x86 processor.*'cuda' here"):
        resolve_precision("int8", torch.device("cuda"))
