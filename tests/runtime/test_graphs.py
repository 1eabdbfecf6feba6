"""Graphs of repeated batches: when they are captured, replayed and dropped, with a recorder that
takes the place of a GPU; and what a forward pass launches on one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from exported_models import images_for, quantized
from fake_gpu import Launched, on_fake_gpu
from families import FAMILIES, Family
from torch import Tensor, nn

import dfq
from dfq.quantization.model import QuantizedViT
from dfq.runtime import float_gemm, graphs, int_mm
from dfq.runtime.graphs import CudaRecorder, GraphCache


class Recorder:
    """Recorder on the CPU that counts."""

    device_type = "cpu"
    recorded: ClassVar[list[tuple[int, ...]]]
    replayed: ClassVar[list[tuple[int, ...]]]
    failing = False
    free = True

    def is_free(self) -> bool:
        return self.free

    def record(self, forward: Callable[[Tensor], Tensor], example: Tensor) -> Any:
        if self.failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded.append(tuple(example.shape))

        def replay(images: Tensor) -> Tensor:
            self.replayed.append(tuple(images.shape))
            return forward(images)

        return replay


@pytest.fixture
def recorder() -> type[Recorder]:
    class Own(Recorder):
        recorded: ClassVar[list[tuple[int, ...]]] = []
        replayed: ClassVar[list[tuple[int, ...]]] = []

    return Own


@pytest.fixture
def model(recorder: type[Recorder]) -> QuantizedViT:
    found = copy.deepcopy(quantized(FAMILIES[0], bits=4, attention="float"))
    found.graphs = GraphCache(recorder)
    found.graphs.enabled = True
    return found


@pytest.fixture
def images(model: QuantizedViT) -> Tensor:
    return images_for(model, 4)


def warm(model: QuantizedViT, images: Tensor, recorder: type[Recorder]) -> None:
    """Run until a graph is replayed, and forget the counts."""
    for _ in range(3):
        model(images)
    assert recorder.replayed
    recorder.recorded.clear()
    recorder.replayed.clear()


def test_the_second_batch_of_a_shape_is_captured_and_replayed(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    expected = model(images)
    assert (recorder.recorded, recorder.replayed) == ([], [])
    assert torch.equal(model(images), expected)
    assert torch.equal(model(images), expected)
    assert recorder.recorded == [tuple(images.shape)]
    assert recorder.replayed == [tuple(images.shape)] * 2
    assert model.graphs.shapes == [tuple(images.shape)]


def test_shapes_and_dtypes_have_graphs_of_their_own(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    warm(model, images, recorder)
    for other in (images[:2], images.double()):
        model(other)
        assert recorder.replayed == []
        model(other)
        assert recorder.replayed == [tuple(other.shape)]
        recorder.replayed.clear()


def test_few_graphs_are_kept_and_shapes_that_take_turns_do_not_evict_each_other(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "PATIENCE", 5)
    cache = GraphCache(recorder)
    cache.enabled = True

    def call(size: int) -> None:
        cache(lambda x: x + 1, torch.zeros(size), lambda: ())

    for size in (*range(1, 6), *range(1, 6)):
        call(size)
    kept = [(1,), (2,), (3,), (4,)]
    assert (recorder.recorded, cache.shapes) == (kept, kept)
    call(1)
    for _ in range(4):
        call(5)
    assert cache.shapes == [(3,), (4,), (1,), (5,)], "the one not used for longest went"
    call(2)
    assert len(recorder.recorded) == 5


CHANGES: dict[str, Callable[[QuantizedViT], object]] = {
    "to": lambda m: m.to("cpu"),
    "backend": lambda m: m.set_backend("float"),
    "state": lambda m: m.load_state_dict(m.state_dict()),
    "train and back": lambda m: m.train().eval(),
    "weights": lambda m: m.linear_layers()["head"].reset(),
    "parameter": lambda m: setattr(m, "pos_embed", nn.Parameter(m.pos_embed + 1, False)),
    "module": lambda m: setattr(m, "norm", copy.deepcopy(m.norm)),
    "nested module": lambda m: setattr(m.block(0), "norm2", copy.deepcopy(m.block(0).norm2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_are_dropped_when_what_they_run_changes(
    change: str, model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    warm(model, images, recorder)
    CHANGES[change](model)
    expected = copy.deepcopy(model)
    expected.graphs.enabled = False
    found = model(images)
    assert recorder.replayed == []
    assert torch.equal(found, expected(images))
    model(images)
    assert recorder.recorded == recorder.replayed == [tuple(images.shape)]


def test_graphs_are_freed_at_once_where_the_model_leaves_the_device(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    for change in ("to", "backend", "state", "train and back"):
        warm(model, images, recorder)
        CHANGES[change](model)
        assert model.graphs.shapes == []


def autocast(call: Callable[[], Tensor], _: QuantizedViT) -> Tensor:
    with torch.autocast("cpu"):
        return call()


def default_device(call: Callable[[], Tensor], _: QuantizedViT) -> Tensor:
    with torch.device("cpu"):
        return call()


def training(call: Callable[[], Tensor], model: QuantizedViT) -> Tensor:
    model.train()
    return call()


def hooked(call: Callable[[], Tensor], model: QuantizedViT) -> Tensor:
    model.block(1).mlp.register_forward_hook(lambda *_: None)
    return call()


def hooked_everywhere(call: Callable[[], Tensor], _: QuantizedViT) -> Tensor:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        return call()
    finally:
        handle.remove()


def replaced_forward(call: Callable[[], Tensor], model: QuantizedViT) -> Tensor:
    block = model.block(0)
    block.forward = block.forward  # type: ignore[method-assign]
    return call()


def dispatched(call: Callable[[], Tensor], _: QuantizedViT) -> Tensor:
    with Launched():
        return call()


def capturing(call: Callable[[], Tensor], model: QuantizedViT) -> Tensor:
    model.graphs._recorder.free = False  # type: ignore[attr-defined]
    return call()


def switched_off(call: Callable[[], Tensor], model: QuantizedViT) -> Tensor:
    model.graphs.enabled = False
    return call()


@pytest.mark.parametrize(
    "way",
    [
        *(autocast, default_device, training, hooked, hooked_everywhere, replaced_forward),
        *(dispatched, capturing, switched_off),
    ],
    ids=lambda way: way.__name__,
)
def test_where_a_graph_would_not_do_the_same_the_pass_runs_as_usual(
    way: Callable[..., Tensor], model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    expected = model(images)
    warm(model, images, recorder)
    found = way(lambda: model(images), model)
    assert recorder.replayed == recorder.recorded == []
    torch.testing.assert_close(found, expected)


def test_hooks_of_the_model_itself_do_not_matter(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    seen: list[Tensor] = []
    model.register_forward_hook(lambda _, __, y: seen.append(y))
    warm(model, images, recorder)
    assert len(seen) == 3


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_modes_of_the_caller_share_graphs(
    mode: Any, model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    warm(model, images, recorder)
    with mode():
        assert not model(images).requires_grad
    assert recorder.replayed == [tuple(images.shape)]


def test_settings_that_choose_kernels_have_graphs_of_their_own(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    warm(model, images, recorder)
    torch.use_deterministic_algorithms(True)
    try:
        model(images)
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorder.replayed == []


def test_empty_batches_and_mistakes_run_as_usual(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    for _ in range(3):
        assert len(model(images[:0])) == 0
        with pytest.raises(dfq.UsageError):
            model(images[..., 1:])
    assert recorder.recorded == []


def test_a_failed_capture_is_kept_as_the_reason_and_not_tried_again(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model(images)
    monkeypatch.setattr(recorder, "failing", True)
    assert torch.equal(model(images), expected)
    assert model.graphs.failure == (
        "RuntimeError: operation not permitted when stream is capturing"
    )
    monkeypatch.setattr(recorder, "failing", False)
    assert torch.equal(model(images), expected)
    assert recorder.recorded == []
    model.set_backend(None)
    assert model.graphs.failure is None


def test_copies_and_pickles_have_no_graphs_but_make_their_own(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    warm(model, images, recorder)
    other = copy.deepcopy(model)
    assert (other.graphs.shapes, other.graphs.enabled) == ([], True)
    assert torch.equal(other(images), model(images))
    cache = pickle.loads(pickle.dumps(GraphCache()))
    assert (cache.shapes, cache.enabled) == ([], False)
    assert isinstance(cache._recorder, CudaRecorder)


def test_threads_capture_a_shape_once(
    model: QuantizedViT, images: Tensor, recorder: type[Recorder]
) -> None:
    expected = model(images)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(model(images))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for each in found)
    assert recorder.recorded == [tuple(images.shape)]


def test_only_loaded_models_have_graphs_and_loading_can_leave_them_out(
    w4a8_saved: Any, w4a8_model: QuantizedViT
) -> None:
    assert not w4a8_model.graphs.enabled
    for wanted in (True, False):
        loaded = dfq.load(w4a8_saved, runtime="torch", cuda_graphs=wanted)
        assert loaded.graphs.enabled == wanted


# ---- a forward pass on a GPU, of tensors without content


@pytest.mark.parametrize(
    ("kernels", "attention"), [(float_gemm, "float"), (float_gemm, "int8"), (int_mm, "float")]
)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_pass_on_a_gpu_neither_waits_for_it_nor_copies_from_the_host(
    family: Family, kernels: Any, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either makes a capture fail, and stops the host at each layer without one."""
    launched = on_fake_gpu(quantized(family, bits=4, attention=attention), kernels, monkeypatch)
    assert len(launched.operations) > 100
    assert launched.transfers() == []


def test_what_would_stop_a_capture_is_noticed() -> None:
    x = torch.zeros(3)
    with Launched() as launched:
        x.new_tensor(3.0)
        float(x[0])
    assert launched.waits() == ["aten::_local_scalar_dense"]
