"""Engines' files and records in listings of the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from exported_models import checkpoint_of

import dfq
from dfq import files
from dfq.checkpoint import recorded_digest, verified_digest
from dfq.engines.entries import ENTRY, FORMAT, SHORT
from dfq.engines.sessions import ENGINES
from dfq.engines.tuning import Choices
from dfq.errors import CheckpointError, DatasetError

DIGEST = "ab" * 32
NAME = DIGEST[:SHORT]


def add(cache: Path, engine: str = "onnxruntime", digest: str = DIGEST) -> Path:
    """An engine's files as :mod:`dfq.engines.entries` writes them, of other content."""
    place = cache / "engines" / digest[:SHORT] / f"{engine}-{'0' * SHORT}"
    place.mkdir(parents=True)
    for name in ENGINES[engine].files:
        (place / name).write_bytes(name.encode() * 100)
    entry = {
        "format": FORMAT,
        "model": "my_vit",
        "checkpoint": "/somewhere/my_vit-w8a8",
        "facts": {"max_weight": 64, "integer_attention": False, "bfloat16": False},
        "sha256": {n: files.sha256(place / n).hexdigest() for n in ENGINES[engine].files},
    }
    (place / ENTRY).write_text(json.dumps(entry))
    return place


def test_files_and_records_of_a_checkpoint_are_one_entry(tmp_path: Path) -> None:
    for engine in ENGINES:
        add(tmp_path, engine)
    for batch in (16, 1):
        Choices(DIGEST, tmp_path, 1).save(batch, {"torch": 1.0})
    Choices(DIGEST, tmp_path, 2).save(4, {"torch": 1.0})
    (entry,) = dfq.list_cache(tmp_path)
    assert (entry.kind, entry.name, entry.model) == ("engines", NAME, "my_vit")
    assert entry.checkpoint == "/somewhere/my_vit-w8a8"
    assert entry.contents == ("onnxruntime", "openvino", "speeds at batch 1, 4, 16")
    written = [p for p in Path(entry.path).rglob("*") if p.is_file()]
    assert entry.bytes == sum(p.stat().st_size for p in written)
    assert entry.problem is None
    assert dfq.verify_cache(tmp_path) == [entry]


def test_a_record_alone_names_its_checkpoint(tmp_path: Path) -> None:
    Choices(DIGEST, tmp_path, 1, tmp_path / "q").save(1, {"torch": 1.0})
    (entry,) = dfq.list_cache(tmp_path)
    assert (entry.checkpoint, entry.contents) == (str(tmp_path / "q"), ("speeds at batch 1",))


def test_damage_is_named_by_listing_where_it_shows_and_by_verifying_always(tmp_path: Path) -> None:
    place = add(tmp_path)
    model = place / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    assert dfq.list_cache(tmp_path)[0].problem is None
    (entry,) = dfq.verify_cache(tmp_path)
    assert f"damaged: {place.name}; written again" in str(entry.problem)
    model.unlink()
    assert place.name in str(dfq.list_cache(tmp_path)[0].problem)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "dfq-engine", "sha256": 3}'])
def test_a_malformed_entry_is_damaged(content: str, tmp_path: Path) -> None:
    (add(tmp_path) / ENTRY).write_text(content)
    (entry,) = dfq.verify_cache(tmp_path)
    assert "damaged" in str(entry.problem)
    assert entry.model == "?"


def test_a_malformed_record_is_damaged(tmp_path: Path) -> None:
    choices = Choices(DIGEST, tmp_path, 1)
    choices.save(1, {"torch": 1.0})
    (record,) = (tmp_path / "engines" / NAME).iterdir()
    record.write_text("{")
    (entry,) = dfq.list_cache(tmp_path)
    assert record.name in str(entry.problem)


def test_engines_of_a_checkpoint_are_removed_by_the_start_of_their_name(tmp_path: Path) -> None:
    add(tmp_path)
    kept = add(tmp_path, digest="cd" * 32)
    with pytest.raises(DatasetError, match="No entry"):
        dfq.remove_cached("ef", tmp_path)
    assert [entry.name for entry in dfq.remove_cached("ab", tmp_path)] == [NAME]
    assert [entry.path for entry in dfq.list_cache(tmp_path)] == [str(kept.parent)]
    dfq.remove_cached("all", tmp_path)
    assert list((tmp_path / "engines").iterdir()) == []


def test_directories_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "engines" / "mine"
    foreign.mkdir(parents=True)
    assert dfq.list_cache(tmp_path) == []
    dfq.remove_cached("all", tmp_path)
    assert foreign.is_dir()


def test_the_command_line_lists_them(cli: Cli, tmp_path: Path) -> None:
    add(tmp_path)
    (entry,) = cli("cache", "list", "--cache", tmp_path, "--json").json
    assert (entry["kind"], entry["contents"]) == ("engines", ["onnxruntime"])
    shown = cli("cache", "list", "--cache", tmp_path).stdout.replace("\n", "")
    assert "onnxruntime" in shown
    (tmp_path / "engines" / NAME / f"onnxruntime-{'0' * SHORT}" / "model.onnx").write_bytes(b"")
    assert cli("cache", "verify", "--cache", tmp_path, "--json").code == 1


@pytest.mark.skipif(ENGINES["onnxruntime"].version is None, reason="onnxruntime is not installed")
def test_what_dfq_load_writes_is_listed(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "q")
    dfq.load(checkpoint, runtime="onnxruntime", cache=tmp_path / "engines_only")
    (entry,) = dfq.verify_cache(tmp_path / "engines_only")
    assert entry.name == recorded_digest(checkpoint)[:SHORT]
    assert (entry.checkpoint, entry.contents) == (str(checkpoint), ("onnxruntime",))
    assert entry.problem is None


def test_speeds_of_kernels_are_listed_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "kernels" / f"{'0' * SHORT}.json"
    path.parent.mkdir()
    times = {"768x768": {"float": 2e-4, "int_mm": None}}
    path.write_text(json.dumps({"format": "dfq-kernel-speeds", "card": "T4", "seconds": times}))
    (entry,) = dfq.list_cache(tmp_path)
    assert (entry.kind, entry.model, entry.contents) == ("kernels", "T4", ("speeds of 768x768",))
    path.write_text("{")
    assert "damaged" in str(dfq.list_cache(tmp_path)[0].problem)
    dfq.remove_cached("000", tmp_path)
    assert not path.exists()


# ---- when files are verified


def test_a_file_is_read_once_per_process_unless_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, read = tmp_path / "file", list[Path]()
    place.write_bytes(b"one")
    original = files.sha256

    def spy(path: Path) -> Any:
        read.append(path)
        return original(path)

    monkeypatch.setattr(files, "sha256", spy)
    first = files.sha256_once(place)
    first.update(b"more")
    assert files.sha256_once(place).hexdigest() == original(place).hexdigest()
    assert read == [place]
    place.write_bytes(b"other")
    assert files.sha256_once(place).hexdigest() == original(place).hexdigest()
    assert len(read) == 2


def test_a_checkpoint_is_verified_anew_when_its_weights_change(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "q")
    assert verified_digest(checkpoint) == verified_digest(checkpoint) == recorded_digest(checkpoint)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged"):
        verified_digest(checkpoint)
