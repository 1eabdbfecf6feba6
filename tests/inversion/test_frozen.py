"""Packed linear layers against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfq.inversion.frozen import FrozenLinear, can_pack, pack_linears

packs = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16),
    reason="this processor has no native bfloat16 products",
)


def layer(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).bfloat16().requires_grad_(False)


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 17, 48), (1, 1, 48), (5, 48)])
def test_output_and_input_gradient_are_those_of_a_linear_layer(
    bias: bool, shape: tuple[int, ...]
) -> None:
    linear = layer(bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = FrozenLinear(linear, 51)(ours), linear(theirs)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


@packs
def test_every_linear_layer_is_packed() -> None:
    model = nn.Sequential(layer(True), nn.Sequential(nn.GELU(), nn.LayerNorm(80)))
    pack_linears(model, 8)
    assert [type(m) for m in model][:1] == [FrozenLinear]
    assert not any(type(m) is nn.Linear for m in model.modules())


def test_other_types_and_devices_are_left_to_pytorch() -> None:
    assert not can_pack(torch.device("cpu"), torch.float32)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
