"""The caller's process: dfq works in it as in a fresh one, and leaves it as it was."""

from __future__ import annotations

import copy
import hashlib
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from callers_process import FAST, Given, default_type, run_together, setting, state
from conftest import make_vit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import dfq


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def both_devices() -> Iterator[None]:
    with default_device(), torch.device("meta"):
        yield


def cuda_autocast() -> AbstractContextManager[None]:
    """Also where there is no GPU."""
    return setting(
        lambda: torch.is_autocast_enabled("cuda"),
        lambda on: torch.set_autocast_enabled("cuda", on),
        True,
    )


@contextmanager
def float_precision() -> Iterator[None]:
    with setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"):
        yield


class Refusing(TorchFunctionMode):
    """A mode of the caller's, in which dfq has no business."""

    def __torch_function__(self, func: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"{func} is seen by the caller's mode")


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_type(torch.float64),
    "bfloat16": lambda: default_type(torch.bfloat16),
    "default device": default_device,
    "device": lambda: torch.device("meta"),
    "device in a default device": both_devices,
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "autocast of cuda": cuda_autocast,
    "deterministic": lambda: setting(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, "error"
    ),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "float32 products rounded": float_precision,
    "one attention kernel": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "without oneDNN": lambda: setting(
        lambda: torch.backends.mkldnn.enabled,
        lambda on: setattr(torch.backends.mkldnn, "enabled", on),
        False,
    ),
    "numpy raises": lambda: np.errstate(all="raise"),
}


OF_CALLS = {**STATES, "function mode": Refusing}
"""A caller's function mode sees what a loaded model does, as it should."""


def digests(path: Path) -> dict[str, str]:
    """Every file below a path, or itself, by its SHA-256; ``report.json`` holds times."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.name != "report.json"
    }


def plain(value: Any) -> Any:
    """A result with its tensors as type, device, bytes, and whether they are of inference mode."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device.type, value.is_inference(), bytes(value.numpy())
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def fields(result: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(result, name) for name in names}


def quantize(given: Given, out: Path) -> Any:
    result = dfq.quantize(given.model, bits=4, out=out / "w", cache=out / "c", **FAST)
    made = [digests(p) for p in sorted((out / "c" / "datasets").iterdir())]
    return made, digests(out / "w"), fields(result, "agreement", "agreement_on", "layers", "bytes")


def invert(given: Given, out: Path) -> Any:
    dfq.invert(given.model, out=out / "images", method="smi", **FAST)
    return digests(out / "images")


def distill(_: Given, out: Path) -> Any:
    arguments: dict[str, Any] = {"data": "noise", "images": 2, "threads": 1, "cache": out / "c"}
    plan = {"steps": 2, "smooth": (), "fractal": 0}
    result = dfq.distill(
        "demo", depth=1, out=out / "s", settings={"distillation": plan}, **arguments
    )
    return digests(out / "s"), result.losses


def evaluate(given: Given, _: Path) -> Any:
    result = dfq.evaluate(given.checkpoint, data=given.npz)
    return fields(result, "images", "accuracy", "accuracy_top5", "backend")


def load(given: Given, _: Path) -> Any:
    return dfq.load(given.checkpoint)


def load_model(given: Given, _: Path) -> Any:
    return {m: dfq.load_model(m).vit for m in (given.model, "demo")}


def export(given: Given, out: Path) -> Any:
    return dfq.export(given.checkpoint, out=out / "w.onnx").products, digests(out / "w.onnx")


def benchmark(given: Given, _: Path) -> Any:
    result = dfq.benchmark(
        given.checkpoint, batch=[1], seconds=1e-3, threads=1, runtimes=["dfq", "torch-fp32"]
    )
    return [row.runtime for row in result.rows], result.absent


def preview(given: Given, out: Path) -> Any:
    dfq.preview(given.images, out / "a.png")
    return digests(out / "a.png")


def write_dataset(given: Given, out: Path) -> Any:
    dfq.write_dataset(out / "set", given.units, given.loaded, origin="copy")
    return digests(out / "set")


def fractal_noise(given: Given, _: Path) -> Any:
    images = dfq.fractal_noise(2, given.loaded.vit.arch.grid, 5)
    return vars(images)


def caches(given: Given, out: Path) -> Any:
    dfq.invert(given.model, cache=out, method="noise", images=2, threads=1)
    listed = [dfq.list_cache(out), dfq.verify_cache(out), dfq.remove_cached("all", out)]
    return [[(e.name, e.bytes, e.problem) for e in entries] for entries in listed]


def doctor(given: Given, _: Path) -> Any:
    return dfq.doctor(given.root)


CALLS: dict[str, Callable[[Given, Path], Any]] = {
    "benchmark": benchmark,
    "distill": distill,
    "doctor": doctor,
    "evaluate": evaluate,
    "export": export,
    "fractal_noise": fractal_noise,
    "inspect": lambda given, _: (dfq.inspect(given.checkpoint), dfq.inspect(given.images)),
    "invert": invert,
    "load": load,
    "load_model": load_model,
    "load_recipe": lambda given, _: dfq.load_recipe(given.root / "recipe.toml"),
    "models": lambda *_: dfq.models("deit"),
    "preview": preview,
    "quantize": quantize,
    "remove_cached": caches,
    "write_dataset": write_dataset,
}


@pytest.fixture(scope="module")
def expected(given_files: Given, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a function gives where nothing is set."""
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            known[name] = plain(CALLS[name](given_files, tmp_path_factory.mktemp("fresh")))
        return known[name]

    return of


def test_every_public_function_is_called() -> None:
    public = {n for n in dfq.__all__ if inspect.isfunction(getattr(dfq, n))}
    assert public - {"list_cache", "verify_cache"} == set(CALLS)


@pytest.mark.parametrize("condition", OF_CALLS)
@pytest.mark.parametrize("name", CALLS)
def test_a_function_works_as_in_a_fresh_process_and_leaves_its_own(
    name: str, condition: str, given_files: Given, expected: Callable[[str], Any], tmp_path: Path
) -> None:
    wanted = expected(name)
    with OF_CALLS[condition]():
        before = state()
        actual = CALLS[name](given_files, tmp_path)
        after = state()
    assert after == before
    assert plain(actual) == wanted


@pytest.mark.parametrize("format", ["torch", "openvino"])
def test_other_formats_are_written_as_in_a_fresh_process(
    format: str, given_files: Given, tmp_path: Path
) -> None:
    if format == "openvino":
        pytest.importorskip("openvino")
    name = {"torch": "a.pt2", "openvino": "a.bin"}[format]
    out = Path(name).with_suffix(".xml" if format == "openvino" else ".pt2")
    for place in ("fresh", "set"):
        (tmp_path / place).mkdir()
    dfq.export(given_files.checkpoint, format=format, out=tmp_path / "fresh" / out)
    with default_type(torch.float64), both_devices(), torch.inference_mode(), Refusing():
        dfq.export(given_files.checkpoint, format=format, out=tmp_path / "set" / out)
    assert digests(tmp_path / "set" / name) == digests(tmp_path / "fresh" / name)


@pytest.mark.parametrize("condition", ["float64", "bfloat16", "inference"])
def test_a_model_that_was_built_in_such_a_process_is_taken(condition: str) -> None:
    with STATES[condition]():
        model: Any = make_vit()
        actual = dfq.load_model(model).vit
    again = dfq.load_model(model).vit
    for vit in (actual, again):
        assert {p.dtype for p in vit.parameters()} == {torch.float32}
        assert not any(p.is_inference() for p in vit.parameters())
        assert torch.equal(vit.get_parameter("head.weight"), model.head.weight.float())


# ---- a loaded model


@pytest.fixture(scope="module", params=["float", "int8"])
def checkpoint(
    request: pytest.FixtureRequest, given_files: Given, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of each kind of attention."""
    path = tmp_path_factory.mktemp("loaded") / request.param
    dfq.quantize(
        given_files.model, bits=4, attention=request.param, calibration=given_files.images, out=path
    )
    return path


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("condition", STATES)
def test_a_loaded_model_gives_the_same_logits_in_any_process(
    checkpoint: Path, condition: str, backend: str | None
) -> None:
    wanted = dfq.load(checkpoint).set_backend(backend)(IMAGES)
    model = dfq.load(checkpoint).set_backend(backend)
    with STATES[condition]():
        before = state()
        first, second = model(IMAGES), model(IMAGES)
        assert state() == before
    assert wanted.dtype == first.dtype == torch.float32
    if condition != "one attention kernel":  # which the caller has chosen
        assert torch.equal(first, wanted)
        assert torch.equal(second, wanted)
    assert torch.equal(model(IMAGES), wanted)


@pytest.mark.parametrize("condition", STATES)
def test_copies_of_a_loaded_model_give_the_same_logits(checkpoint: Path, condition: str) -> None:
    model = dfq.load(checkpoint)
    wanted = model(IMAGES)
    with STATES[condition]():
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        moved = copy.deepcopy(model).to("cpu")
    for each in (*copies, moved):
        assert torch.equal(each(IMAGES), wanted)


def test_threads_may_be_the_first_to_call_a_model_all_at_once(checkpoint: Path) -> None:
    wanted = dfq.load(checkpoint)(IMAGES)
    model, outputs = dfq.load(checkpoint), []
    together = threading.Barrier(8)

    def call() -> None:
        together.wait()
        outputs.append(model(IMAGES))

    run_together([call] * 8)
    assert len(outputs) == 8
    assert all(torch.equal(logits, wanted) for logits in outputs)


def test_what_the_processor_can_do_is_asked_once_and_rightly() -> None:
    from dfq.device import _worst_product_is_exact

    wanted = _worst_product_is_exact(127)
    for condition in STATES.values():
        _worst_product_is_exact.cache_clear()
        with condition():
            assert _worst_product_is_exact(127) is wanted


@pytest.mark.parametrize("condition", STATES)
def test_a_dataset_is_read_the_same_in_any_process(given_files: Given, condition: str) -> None:
    wanted = [image.patches for unit in given_files.units for image in unit]
    with STATES[condition]():
        dataset = dfq.SparseImageDataset(given_files.images)
        dataset.verify()
        images = [image for unit in dataset.units() for image in unit]
    assert all(torch.equal(a.patches, b) for a, b in zip(images, wanted, strict=True))
