"""CUDA graphs of a module's forward pass, captured for inputs whose shape repeats.

A graph starts all kernels of a forward pass at once, in place of one launch from the host for each.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.modules import module as global_hooks
from torch.overrides import _len_torch_function_stack

from dfq.runtime import opaque

MAX_GRAPHS = 4
"""Graphs that a model keeps; the one that was not used for longest is dropped."""

MAX_SEEN = 64
"""Shapes that are remembered."""

PATIENCE = 32
"""Passes of a shape before another graph is dropped for its own; capturing takes about as long as
three."""

Forward = Callable[[Tensor], Tensor]


def capture(
    work: Callable[[], object], pool: Any = None, stream: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph:
    """Capture the kernels that ``work`` launches, without running them.

    Calls of other threads do not disturb it.  ``pool``: memory pool that the graph allocates from.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph


class Recorder(Protocol):
    """Recorder of forward passes, which are then replayed one at a time."""

    device_type: str

    def is_free(self) -> bool:
        """Whether a graph may be recorded or replayed now."""

    def record(self, forward: Forward, example: Tensor) -> Forward:
        """Return a function that computes ``forward`` for inputs like ``example``."""


class CudaRecorder:
    """Recorder of CUDA graphs that share a memory pool.

    Inputs are copied to tensors of fixed addresses and outputs cloned.  A replay waits for the one
    before, whatever streams they are on.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None

    def is_free(self) -> bool:
        return not torch.cuda.is_current_stream_capturing()

    def record(self, forward: Forward, example: Tensor) -> Forward:
        with (
            torch.cuda.device(example.device),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream()
                self._done = torch.cuda.Event()
            inputs = torch.empty(example.shape, dtype=example.dtype, device=example.device)
            inputs.copy_(example)
            self._warm_up(forward, inputs)
            outputs: list[Tensor] = []
            graph = capture(lambda: outputs.append(forward(inputs)), self._pool, self._stream)
            self._done.record()
        return lambda images: self._replay(graph, inputs, outputs[0], images)

    def _warm_up(self, forward: Forward, inputs: Tensor) -> None:
        """Run once on the stream of the capture, on which libraries then initialize."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            forward(inputs)
        current.wait_stream(self._stream)

    def _replay(
        self, graph: torch.cuda.CUDAGraph, inputs: Tensor, output: Tensor, images: Tensor
    ) -> Tensor:
        with torch.cuda.device(images.device), torch.no_grad():
            self._done.wait()
            inputs.copy_(images)
            graph.replay()
            logits = output.clone()
            self._done.record()
        return logits


class GraphCache:
    """Graphs of a module's forward pass by shape and dtype of its input.

    The first input of a shape runs as usual, the second is recorded, and from then on the graph is
    replayed.  Of more than :data:`MAX_GRAPHS` shapes those are recorded that repeat often.  Graphs
    are dropped when what they run changes (:meth:`__call__`); copies and pickles have none.  Where
    a graph would not do the same, the forward pass runs as usual: in training mode, under autocast,
    function modes, functional transforms, ``torch.compile`` or another capture, and with hooks.  If
    a recording fails, all passes run as usual, and ``failure`` says why.

    Several threads may share it.
    """

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder) -> None:
        self.enabled = False
        self._make_recorder = recorder
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Drop all graphs; a failure is forgotten."""
        with self._lock:
            self.failure: str | None = None
            self._recorder = self._make_recorder()
            self._graphs: OrderedDict[object, Forward] = OrderedDict()
            self._passes: OrderedDict[object, int] = OrderedDict()
            self._state: Sequence[object] = ()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes that there are graphs of, the last used at the end."""
        return [key[0] for key in self._graphs]  # type: ignore[index]

    def __call__(
        self, forward: Forward, x: Tensor, state: Callable[[], Sequence[object] | None]
    ) -> Tensor:
        """Return ``forward(x)``.

        ``state`` returns the objects that a graph depends on: when one of them is another than at
        the call before, graphs are dropped.  None if a graph would not do the same.
        """
        if not self._applies(x):
            return forward(x)
        objects = state()
        if objects is None:
            return forward(x)
        key = (tuple(x.shape), x.dtype, x.device, _numerics())
        with self._lock:
            self._keep_for(objects)
            graph = self._graph(forward, x, key)
            if graph is not None:
                return graph(x)
        y = forward(x)
        with self._lock:
            self._note(key, state())
        return y

    def _applies(self, x: Any) -> bool:
        return (
            self.enabled
            and type(x) is Tensor
            and x.device.type == self._recorder.device_type
            and x.numel() > 0
            and not opaque.tracing()
            and not torch.is_autocast_enabled(x.device.type)
            and not _len_torch_function_stack()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
            and not global_hooks._has_any_global_hook()
            and self._recorder.is_free()
        )

    def _keep_for(self, objects: Sequence[object]) -> None:
        """Drop the graphs unless they depend on these objects."""
        same = len(objects) == len(self._state) and all(map(operator.is_, objects, self._state))
        if not same:
            self.clear()
            self._state = objects

    def _graph(self, forward: Forward, x: Tensor, key: object) -> Forward | None:
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        full = len(self._graphs) >= MAX_GRAPHS
        if self.failure is not None or self._passes.get(key, 0) < (PATIENCE if full else 1):
            return None
        if full:
            dropped, _ = self._graphs.popitem(last=False)
            self._passes.pop(dropped, None)
        try:
            graph = self._recorder.record(forward, x)
        except Exception as error:  # the errors of a capture are not documented
            self._graphs.clear()
            self.failure = f"{type(error).__name__}: {error}"
            return None
        self._graphs[key] = graph
        return graph

    def _note(self, key: object, objects: Sequence[object] | None) -> None:
        """Count a pass of a shape; the first may have built what graphs depend on."""
        if objects is not None:
            self._keep_for(objects)
            self._passes[key] = self._passes.pop(key, 0) + 1
            if len(self._passes) > MAX_SEEN:
                self._passes.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"enabled": self.enabled, "_make_recorder": self._make_recorder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self.clear()


def _numerics() -> tuple[object, ...]:
    """Return the settings of the process that choose between kernels."""
    cuda: Any = torch.backends.cuda
    matmul = cuda.matmul
    return (
        torch.get_deterministic_debug_mode(),
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
