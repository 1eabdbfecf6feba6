"""An ONNX graph under construction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor


class Graph:
    """ONNX graph under construction, in the order in which nodes are added.

    Nodes are named by their part of the model and their operator, as in
    ``blocks.0.attn.qkv/MatMul``; values have the name of the node that outputs them.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._scope: list[str] = []
        self._used: Counter[str] = Counter()

    @property
    def size(self) -> int:
        """Size of all constants in bytes."""
        return sum(len(c.raw_data) for c in self.constants.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Prefix the names of everything added inside the block with ``name``."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def _name(self, kind: str) -> str:
        name = f"{'.'.join(self._scope)}/{kind}"
        self._used[name] += 1
        count = self._used[name]
        return name if count == 1 else f"{name}_{count}"

    def nodes_of(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node; returns the names of its outputs."""
        name = self._name(kind)
        names = [name] if outputs == 1 else [f"{name}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output; returns its name."""
        return self.nodes_of(kind, *inputs, **attributes)[0]

    def constant(self, name: str, value: Tensor | NDArray[Any] | list[int]) -> str:
        """Add a constant under a name of this part; a list becomes int64."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        full = self._name(name)
        self.constants[full] = numpy_helper.from_array(np.array(array, order="C"), full)
        return full

    def scalar(self, name: str, value: float) -> str:
        """Add a float32 scalar."""
        return self.constant(name, np.array(value, np.float32))

    def packed(self, name: str, kind: int, shape: tuple[int, ...], content: bytes) -> str:
        """Add a constant of a type that numpy does not have."""
        full = self._name(name)
        self.constants[full] = helper.make_tensor(full, kind, shape, content, raw=True)
        return full

    def shaped(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps a dimension."""
        return self.op("Reshape", x, self.constant("shape", list(shape)))

    def rename(self, value: str, name: str) -> None:
        """Rename the output of the last node."""
        assert list(self.nodes[-1].output) == [value]
        self.nodes[-1].output[0] = name
