"""A GPU without a GPU: forward passes of tensors that have a device and no content."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from exported_models import images_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfq import device
from dfq.quantization.model import QuantizedAttention, QuantizedViT
from dfq.runtime import float_gemm

GPU = torch.device("cuda", 0)

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
"""Operations whose result the host needs."""


class Launched(TorchDispatchMode):
    """Mode that notes each operation with the devices of its tensors and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, set[str], set[str]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.operations.append((function.name(), _devices(operands), _devices(results)))
        return result

    def waits(self) -> list[str]:
        """Operations that wait for the device."""
        return [name for name, *_ in self.operations if name.startswith(WAITING)]

    def transfers(self) -> list[str]:
        """Operations that wait for the device, or copy to it from the host or back."""
        moved = [
            name
            for name, operands, results in self.operations
            if name.startswith(("aten::_to_copy", "aten::copy_")) and len(operands | results) > 1
        ]
        return [*self.waits(), *moved]


def _devices(tensors: list[Tensor]) -> set[str]:
    return {x.device.type for x in tensors}


def on_fake_gpu(model: QuantizedViT, kernels: Any, patch: pytest.MonkeyPatch) -> Launched:
    """Run a model on a GPU that multiplies bfloat16 with the kernels of a backend, after a first
    pass; what the second launches.

    Weights are packed beforehand, as their content decides how.
    """
    for place in (device, float_gemm):
        patch.setattr(place, "multiplies_bfloat16", lambda _: True)
    float_gemm.linear_dtype.cache_clear()
    moved = copy.deepcopy(model)
    images = images_for(model, 2)
    packed = {name: kernels.prepack(x._params()) for name, x in moved.linear_layers().items()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return torch.empty_like(mode.from_tensor(x), device=GPU, dtype=dtype)

        for module in moved.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    kept = nn.Parameter(fake(parameter.detach()), requires_grad=False)
                    module._parameters[name] = kept
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else fake(buffer)
            if isinstance(module, QuantizedAttention):
                module._float_format = module._make_float_format(GPU)
        for name, layer in moved.linear_layers().items():
            layer.reset()
            layer._prepacked = (kernels, layer._params(), _moved(packed[name], fake))
        x = torch.empty(images.shape, device=GPU)
        moved(x)
        with Launched() as launched:
            moved(x)
    float_gemm.linear_dtype.cache_clear()
    return launched


def _moved(packed: Any, fake: Callable[..., Tensor]) -> Any:
    """A packed weight as it is on the GPU, where operands in floating point are bfloat16."""
    if isinstance(packed, float_gemm.PackedWeight):
        parts = tuple(fake(part, torch.bfloat16) for part in packed.parts)
        return float_gemm.PackedWeight(parts, fake(packed.scale))
    values = {field.name: fake(getattr(packed, field.name)) for field in fields(packed)}
    return replace(packed, **values)
