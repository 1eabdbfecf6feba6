"""Custom operators that ``torch.compile`` calls without tracing into them.

The compiler cannot trace oneDNN's packed weights, and it would hold the attention scores of a whole
batch in memory at once.  An :class:`OpaqueModule` has a number; the compiled graph passes that
number to a custom operator, which calls the module.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any, Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dfq.runtime.params import OutputFormat

COMPILERS = ("g++", "clang++", "cl")

_numbers = itertools.count()
_modules: WeakValueDictionary[int, OpaqueModule] = WeakValueDictionary()


class OpaqueModule(nn.Module):
    """Module that compiled graphs call by its ``number``; a copy gets a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._register()

    def _register(self) -> None:
        self.number = next(_numbers)
        _modules[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()


class Linear(Protocol):
    """Opaque module with integer weights."""

    out_features: int

    def integer_forward(self, x: Tensor, out: OutputFormat | None = None) -> Tensor: ...


def compiling() -> bool:
    """Whether ``torch.compile`` is tracing; False under ``torch.export``."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def exporting() -> bool:
    """Whether ``torch.export``, ``torch.jit`` or the ONNX exporter is tracing."""
    return bool(
        torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    )


def tracing() -> bool:
    """Whether any tracer runs, so that only plain torch operators may be used."""
    return compiling() or exporting()


def compiler() -> str | None:
    """Name of a C++ compiler on the PATH that ``torch.compile`` can use; None without one."""
    return next((name for name in COMPILERS if shutil.which(name)), None)


def linear(module: OpaqueModule, x: Tensor, out: OutputFormat) -> Tensor:
    """Call ``module.integer_forward(x, out)`` through the custom operator."""
    units, scale = (out.scale, 1.0) if isinstance(out.scale, Tensor) else (None, out.scale)
    y: Tensor = torch.ops.dfq.linear(
        x, module.number, units, scale, out.zero_point, out.qmax, out.dtype, out.gelu
    )
    return y


def attention(
    module: OpaqueModule, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None
) -> Tensor:
    """Call ``module(q, k, v, bias, scale)`` through the custom operator."""
    y: Tensor = torch.ops.dfq.attention(q, k, v, bias, scale, module.number)
    return y


def _linear(
    x: Tensor,
    module: int,
    units: Tensor | None,
    scale: float,
    zero_point: int,
    qmax: int,
    dtype: torch.dtype,
    gelu: Any,
) -> Tensor:
    out = OutputFormat(dtype, scale if units is None else units, zero_point, qmax, gelu)
    return cast(Linear, _modules[module]).integer_forward(x, out)


def _fake_linear(x: Tensor, module: int, *rest: Any) -> Tensor:
    *_, dtype, _ = rest
    outputs = cast(Linear, _modules[module]).out_features
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, module: int
) -> Tensor:
    y: Tensor = _modules[module](q, k, v, bias, scale)
    return y


def _fake_attention(q: Tensor, *_: Any) -> Tensor:
    b, h, t, d = q.shape
    return q.new_empty((b, t, h * d), dtype=torch.float32)


def _define(
    name: str, schema: str, call: Callable[..., Tensor], like: Callable[..., Tensor]
) -> None:
    torch.library.define(name, schema)
    torch.library.impl(name, ("CPU", "CUDA"), call)
    torch.library.register_fake(name, like)


_define(
    "dfq::linear",
    "(Tensor x, int module, Tensor? units, float scale, int zero_point, int qmax, ScalarType dtype,"
    " str? gelu) -> Tensor",
    _linear,
    _fake_linear,
)
_define(
    "dfq::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, float? scale, int module) -> Tensor",
    _attention,
    _fake_attention,
)
