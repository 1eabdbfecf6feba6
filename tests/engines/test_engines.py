"""``dfq.load(..., runtime=ENGINE)``: the same module on another runtime."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import MEMBERS, checkpoint_of, images_for, quantized, spread
from families import Family
from saved_checkpoints import save
from torch import Tensor

import dfq
from dfq.engines import entries, sessions
from dfq.engines.sessions import ENGINES, ModelFacts
from dfq.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    DfqError,
    ExtraError,
    OutputError,
    SettingError,
)
from dfq.installation import install_command
from dfq.results.values import to_json

ONNX = "onnxruntime"
HERE = [
    pytest.param(
        name, marks=pytest.mark.skipif(engine.version is None, reason=f"{name} is not installed")
    )
    for name, engine in ENGINES.items()
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("engines") / "w4a8", bits=4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def on_torch(checkpoint: Path) -> dfq.QuantizedViT:
    return dfq.load(checkpoint, runtime="torch")


def load(checkpoint: Path, name: str, cache: Path) -> dfq.EngineModel:
    model = dfq.load(checkpoint, runtime=name, cache=cache)
    assert isinstance(model, dfq.EngineModel)
    return model


@pytest.fixture(params=HERE)
def model(request: pytest.FixtureRequest, checkpoint: Path, cache: Path) -> dfq.EngineModel:
    return load(checkpoint, request.param, cache)


@pytest.fixture
def images(on_torch: dfq.QuantizedViT) -> Tensor:
    return images_for(on_torch, 6)


# ---- the same module


def test_logits_are_those_of_the_checkpoint(
    model: dfq.EngineModel, on_torch: dfq.QuantizedViT, images: Tensor
) -> None:
    actual = model(images)
    assert (actual.dtype, actual.shape) == (torch.float32, (6, on_torch.arch.num_classes))
    assert spread(actual, on_torch(images)) < 0.3


@pytest.mark.parametrize("family", MEMBERS[::9])
@pytest.mark.parametrize("name", HERE)
def test_families_run(name: str, family: Family, tmp_path: Path) -> None:
    expected = quantized(family, bits=8, attention="float")
    save(tmp_path / "checkpoint", expected)
    actual = load(tmp_path / "checkpoint", name, tmp_path / "cache")(images_for(expected))
    assert spread(actual, expected(images_for(expected))) < 0.3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_images(count: int, model: dfq.EngineModel, images: Tensor) -> None:
    torch.testing.assert_close(model(images[:count]), model(images)[:count], rtol=0.05, atol=0.05)


def test_layouts_and_dtypes_of_images_do_not_matter(model: dfq.EngineModel, images: Tensor) -> None:
    expected = model(images)
    laid_out = images.to(memory_format=torch.channels_last)
    for other in (laid_out, images.double()):
        assert torch.equal(model(other), expected)
    with torch.inference_mode():
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_has_no_logits(
    value: float, model: dfq.EngineModel, images: Tensor
) -> None:
    images = images.clone()
    images[2, 0, 0, 0] = value
    finite = model(images).isfinite().all(1)
    assert finite.tolist() == [True, True, False, True, True, True]


def test_it_says_what_it_is(model: dfq.EngineModel, on_torch: dfq.QuantizedViT) -> None:
    for name in ("arch", "preprocessing", "settings"):
        assert getattr(model, name) == getattr(on_torch, name)
    assert (model.scheme.name, model.max_weight()) == ("w4a8", on_torch.max_weight())
    assert model.backend in repr(model)
    assert not model.compiled
    assert not model.training
    assert model.state_dict() == {}
    assert model.set_backend(None) is model.set_backend(model.backend) is model


def test_what_keeps_the_module_as_it_is_is_taken(model: dfq.EngineModel) -> None:
    assert model.eval() is model
    assert model.to("cpu") is model
    assert model.cpu() is model
    assert model.float() is model
    assert model.requires_grad_(False) is model
    assert not model.training


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], type[DfqError], str]] = {
    "gpu": (lambda m, _: m.cuda(), DeviceError, "cannot be moved to a GPU"),
    "device": (lambda m, _: m.to("meta"), DeviceError, "cannot be moved to meta"),
    "dtype": (lambda m, _: m.half(), SettingError, "cannot change its type"),
    "training": (lambda m, _: m.train(), SettingError, "cannot be trained"),
    "gradients": (lambda m, _: m.requires_grad_(), SettingError, "gives no gradients"),
    "images": (lambda m, x: m(x.requires_grad_()), DataError, "gives no gradients"),
    "sparse": (lambda m, x: m.forward_sparse(x), SettingError, "takes whole images"),
    "backend": (lambda m, _: m.set_backend("onednn"), SettingError, "no backend 'onednn'"),
    "compile": (lambda m, _: m.compile(), SettingError, "torch.compile does nothing"),
    "size": (lambda m, x: m(x[..., 1:]), DataError, "takes normalized images"),
    "integers": (lambda m, x: m(x.to(torch.uint8)), DataError, "got torch.uint8"),
    "place": (lambda m, x: m(x.to("meta")), DataError, "got images on meta"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.skipif(ENGINES[ONNX].version is None, reason="onnxruntime is not installed")
def test_what_an_engine_cannot_do_is_refused(
    what: str, checkpoint: Path, cache: Path, images: Tensor
) -> None:
    call, kind, message = REFUSED[what]
    if what == "gpu" and torch.cuda.is_available():
        message = "cannot be moved to cuda"
    with pytest.raises(kind, match=message):
        call(load(checkpoint, ONNX, cache), images)


def test_copies_and_pickles_compute_the_same(model: dfq.EngineModel, images: Tensor) -> None:
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        assert other.backend == model.backend


def test_threads_are_those_of_torch(
    model: dfq.EngineModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, opened = model._session.files.engine, []
    given = engine.open

    def spy(directory: Path, threads: int, facts: ModelFacts) -> Any:
        opened.append(threads)
        return given(directory, threads, facts)

    files = replace(model._session.files, engine=replace(engine, open=spy))
    monkeypatch.setattr(model._session, "files", files)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        model(images)
        model(images)
    finally:
        torch.set_num_threads(before)
    model(images)
    assert opened == [before + 1, before]


def test_threads_of_python_share_a_model(model: dfq.EngineModel, images: Tensor) -> None:
    expected, outputs = model(images), [torch.empty(0)] * 4

    def call(index: int) -> None:
        for _ in range(5):
            outputs[index] = model(images)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(len(outputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(logits, expected) for logits in outputs)


def test_a_checkpoint_can_be_evaluated_on_an_engine(
    model: dfq.EngineModel, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.setenv("DFQ_CACHE", str(tmp_path))
    generator = np.random.default_rng(0)
    side = model.arch.image_size[0]
    x = generator.integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(8, dtype=np.uint8) % 4)
    evaluation = dfq.evaluate(checkpoint, data=tmp_path / "images.npz", runtime=model.backend)
    assert evaluation.backend == model.backend
    assert to_json(evaluation)["images"] == 8


# ---- files in the cache


def entry_of(cache: Path, name: str) -> Path:
    (directory,) = cache.glob(f"engines/*/{name}-*")
    return directory


@pytest.mark.parametrize("name", HERE)
def test_files_are_written_once(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(checkpoint, name, tmp_path)
    written = {p: p.stat().st_mtime_ns for p in entry_of(tmp_path, name).iterdir()}
    assert {p.name for p in written} == {*ENGINES[name].files, entries.ENTRY}
    monkeypatch.setattr(entries.EngineModelFiles, "_export", None)
    load(checkpoint, name, tmp_path)
    assert written == {p: p.stat().st_mtime_ns for p in entry_of(tmp_path, name).iterdir()}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("damage", ["cut", "missing", "no entry", "no JSON", "other JSON"])
def test_a_damaged_entry_is_written_again(
    name: str, damage: str, checkpoint: Path, cache: Path, tmp_path: Path, images: Tensor
) -> None:
    expected = load(checkpoint, name, cache)(images)
    shutil.copytree(cache / "engines", tmp_path / "engines")
    directory = entry_of(tmp_path, name)
    model_file, entry = directory / ENGINES[name].files[-1], directory / entries.ENTRY
    content = model_file.read_bytes()
    if damage == "cut":
        model_file.write_bytes(content[:-1])
    elif damage == "missing":
        model_file.unlink()
    elif damage == "no entry":
        entry.unlink()
    else:
        entry.write_text("{" if damage == "no JSON" else "[]")
    assert torch.equal(load(checkpoint, name, tmp_path)(images), expected)
    assert model_file.read_bytes() == content
    assert json.loads(entry.read_text())["format"] == entries.FORMAT


@pytest.mark.skipif(ENGINES[ONNX].version is None, reason="onnxruntime is not installed")
class TestEntries:
    @pytest.mark.parametrize(
        "changes",
        [
            *({"max_weight": value} for value in ("x", -5, 0, 129, 64.0, True, None)),
            {"integer_attention": 0},
            {"bfloat16": "yes"},
            {"parsecs": 1},
        ],
        ids=str,
    )
    def test_facts_of_another_type_are_a_damaged_entry(
        self, changes: dict[str, Any], checkpoint: Path, tmp_path: Path
    ) -> None:
        right = load(checkpoint, ONNX, tmp_path).max_weight()
        file = entry_of(tmp_path, ONNX) / entries.ENTRY
        before = json.loads(file.read_text())
        file.write_text(json.dumps({**before, "facts": {**before["facts"], **changes}}))
        assert load(checkpoint, ONNX, tmp_path).max_weight() == right
        assert json.loads(file.read_text()) == before

    def test_largest_weight_is_known_without_reading_files_again(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = load(checkpoint, ONNX, tmp_path)
        monkeypatch.setattr(entries, "sha256_once", None)
        assert model.max_weight() == dfq.load(checkpoint, runtime="torch").max_weight()

    @pytest.mark.parametrize("place", ["entry", "older"])
    def test_files_of_the_user_in_the_cache_are_kept(
        self, place: str, checkpoint: Path, tmp_path: Path
    ) -> None:
        load(checkpoint, ONNX, tmp_path)
        entry = entry_of(tmp_path, ONNX)
        (entry / entries.ENTRY).write_text("{")
        directory = entry if place == "entry" else entry.with_name(f"{ONNX}-old")
        directory.mkdir(exist_ok=True)
        (directory / "notes.txt").write_text("precious")
        if place == "older":
            load(checkpoint, ONNX, tmp_path)
        else:
            with pytest.raises(OutputError, match=r"also holds 'notes\.txt'"):
                load(checkpoint, ONNX, tmp_path)
        assert (directory / "notes.txt").read_text() == "precious"

    def test_another_version_has_another_entry_and_replaces_the_older(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load(checkpoint, ONNX, tmp_path)
        older = entry_of(tmp_path, ONNX)
        monkeypatch.setattr(sessions.metadata, "version", lambda _: "99.0")
        load(checkpoint, ONNX, tmp_path)
        assert entry_of(tmp_path, ONNX) != older

    def test_a_failed_export_leaves_nothing(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(entries, "sha256", fail)
        with pytest.raises(KeyboardInterrupt):
            load(checkpoint, ONNX, tmp_path)
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []

    def test_a_cache_that_cannot_be_written_is_named(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=r"\$DFQ_CACHE"):
            load(checkpoint, ONNX, tmp_path / "file")

    def test_an_entry_is_written_by_whoever_is_first(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load(checkpoint, ONNX, tmp_path)
        reads = [None, ModelFacts(7, False)]  # missing at first, whole after the failed write

        def lost(*_: Any) -> Any:
            raise OutputError("Cannot write.")

        monkeypatch.setattr(entries, "_read", lambda *_: reads.pop(0))
        monkeypatch.setattr(entries, "replaced_directory", lost)
        load(checkpoint, ONNX, tmp_path)
        assert reads == []

    def test_another_checkpoint_in_its_place_is_noticed(
        self, tmp_path: Path, images: Tensor
    ) -> None:
        place = tmp_path / "w8a8"
        checkpoint_of(place, bits=8)
        kept = pickle.dumps(load(place, ONNX, tmp_path / "cache"))
        checkpoint_of(place, bits=8, seed=1)
        pickle.loads(kept)(images)  # the entry is there
        for file in entry_of(tmp_path / "cache", ONNX).iterdir():
            file.unlink()
        with pytest.raises(CheckpointError, match="another checkpoint"):
            pickle.loads(kept)

    def test_a_damaged_checkpoint_is_refused(self, tmp_path: Path) -> None:
        place = checkpoint_of(tmp_path / "w8a8")
        load(place, ONNX, tmp_path)
        weights = place / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        with pytest.raises(CheckpointError, match="damaged"):
            load(place, ONNX, tmp_path)


# ---- mistakes


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_package_is_named_with_its_extra(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "installed", lambda _: False)
    with pytest.raises(ExtraError) as raised:
        dfq.load(checkpoint, runtime=name, cache=tmp_path)
    assert install_command(ENGINES[name].extra) in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"runtime": "onnxruntim"}, SettingError, "Did you mean 'onnxruntime'"),
        ({"runtime": "openvino", "compiled": True}, SettingError, "compiled is of runtime 'torch'"),
        ({"runtime": "torch", "tune": True}, SettingError, "it goes with runtime 'auto'"),
        ({"tune": True, "compiled": True}, SettingError, "it goes with runtime 'auto'"),
        ({"batch": 0}, SettingError, "batch is 0; it is from 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_is_explained(
    changes: dict[str, Any], kind: type[DfqError], message: str, checkpoint: Path
) -> None:
    with pytest.raises(kind, match=message):
        dfq.load(checkpoint, **changes)


# ---- processors


FULL, PORTABLE = ModelFacts(127, False), ModelFacts(64, False)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ENGINES)
def test_products_that_would_saturate_are_refused(
    name: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "cpu_has", lambda _: True)
    monkeypatch.setattr(sessions, "int8_is_exact", lambda _: exact)
    reasons = [
        ENGINES[name].unsupported_reason(facts)
        for facts in (PORTABLE, FULL, replace(PORTABLE, integer_attention=True))
    ]
    refused = [reason is not None for reason in reasons]
    assert refused == ([False] * 3 if exact else [False, name == "openvino", True])


@pytest.mark.skipif(ENGINES[ONNX].version is None, reason="onnxruntime is not installed")
def test_onnxruntime_multiplies_the_full_range_exactly_without_vnni(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint, ONNX, tmp_path)
    asked: list[Any] = []
    ort = sessions.require(ONNX, "onnx")
    given = ort.SessionOptions.add_session_config_entry

    def spy(options: Any, *entry: str) -> None:
        asked.append(entry)
        given(options, *entry)

    monkeypatch.setattr(ort.SessionOptions, "add_session_config_entry", spy)
    monkeypatch.setattr(sessions, "_adds_in_16_bits", lambda: True)
    directory, facts = model._session.files.prepare()
    for largest in (64, 127):
        ENGINES[ONNX].open(directory, 1, replace(facts, max_weight=largest))
    assert asked == [("session.x64quantprecision", "1")]


@pytest.mark.skipif(ENGINES["openvino"].version is None, reason="openvino is not installed")
@pytest.mark.parametrize(("distance", "taken"), [(1.9, True), (2.1, False)])
def test_bfloat16_is_taken_where_it_is_as_close_as_float32(
    distance: float,
    taken: bool,
    checkpoint: Path,
    on_torch: dfq.QuantizedViT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fake(directory: Path, threads: int, facts: ModelFacts) -> Any:  # noqa: ARG001
        error = distance if facts.bfloat16 else 1.0
        return lambda x: (on_torch(torch.from_numpy(x)) + error).numpy()

    monkeypatch.setattr(entries, "multiplies_bfloat16", lambda _: True)
    engine = replace(ENGINES["openvino"], open=fake)
    monkeypatch.setitem(ENGINES, "openvino", engine)
    model = load(checkpoint, "openvino", tmp_path)
    assert model._session.files.prepare()[1].bfloat16 == taken
