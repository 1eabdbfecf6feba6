"""Calls that ``torch.compile`` makes without looking into them.

Its compiler cannot trace through oneDNN's packed weights, and would lay attention's scores of a
whole batch into memory at once.  A layer that is a :class:`Part` has a number, and the compiled
graph calls it by that.
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
_parts: WeakValueDictionary[int, Part] = WeakValueDictionary()


class Part(nn.Module):
    """A layer that compiled graphs call by its number; copies have their own."""

    def __init__(self) -> None:
        super().__init__()
        self._register()

    def _register(self) -> None:
        self.number = next(_numbers)
        _parts[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()


class Linear(Protocol):
    """A part that multiplies integers."""

    out_features: int

    def integer_forward(self, x: Tensor, out: OutputFormat | None = None) -> Tensor: ...


def compiling() -> bool:
    """Whether ``torch.compile`` is tracing; not so for ``torch.export``."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def exporting() -> bool:
    """Whether the model is being traced into a program that other processes run."""
    return bool(
        torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    )


def tracing() -> bool:
    """Whether anything traces the model, so that it must stay within plain operators."""
    return compiling() or exporting()


def compiler() -> str | None:
    """A C++ compiler that ``torch.compile`` can use, where there is one."""
    return next((name for name in COMPILERS if shutil.which(name)), None)


def linear(part: Part, x: Tensor, out: OutputFormat) -> Tensor:
    """``part.integer_forward(x, out)``, whole."""
    units, scale = (out.scale, 1.0) if isinstance(out.scale, Tensor) else (None, out.scale)
    y: Tensor = torch.ops.dfq.linear(
        x, part.number, units, scale, out.zero_point, out.qmax, out.dtype, out.gelu
    )
    return y


def attention(
    part: Part, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None
) -> Tensor:
    """``part(q, k, v, bias, scale)``, whole."""
    y: Tensor = torch.ops.dfq.attention(q, k, v, bias, scale, part.number)
    return y


def _linear(
    x: Tensor,
    part: int,
    units: Tensor | None,
    scale: float,
    zero_point: int,
    qmax: int,
    dtype: torch.dtype,
    gelu: Any,
) -> Tensor:
    out = OutputFormat(dtype, scale if units is None else units, zero_point, qmax, gelu)
    return cast(Linear, _parts[part]).integer_forward(x, out)


def _shape_of_linear(x: Tensor, part: int, *rest: Any) -> Tensor:
    *_, dtype, _ = rest
    outputs = cast(Linear, _parts[part]).out_features
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, part: int
) -> Tensor:
    y: Tensor = _parts[part](q, k, v, bias, scale)
    return y


def _shape_of_attention(q: Tensor, *_: Any) -> Tensor:
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
    "(Tensor x, int part, Tensor? units, float scale, int zero_point, int qmax, ScalarType dtype,"
    " str? gelu) -> Tensor",
    _linear,
    _shape_of_linear,
)
_define(
    "dfq::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, float? scale, int part) -> Tensor",
    _attention,
    _shape_of_attention,
)
