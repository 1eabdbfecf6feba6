"""Datasets kept between runs."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from trees import tree

from dfq.cache import cache_directory
from dfq.data.dataset import DatasetWriter, shard_name
from dfq.errors import DatasetError, OutputError, SettingError
from dfq.pipeline.cached import list_cache, remove_cached, verify_cache
from dfq.sparse import SparseImages

SETTINGS: dict[str, Any] = {
    "format": "dfq-sparse-images",
    "format_version": 1,
    "model": {"name": "some_vit.tag", "fingerprint": "f" * 64},
    "grid": {"image_size": [4, 4], "patch_size": [2, 2], "channels": 1},
    "inversion": {"method": "smi"},
}

SHARD = shard_name(0, 2)


def add(cache: Path, name: str, *, finished: bool = True) -> Path:
    """Put a dataset of three images into a cache."""
    path = cache / "datasets" / name
    writer = DatasetWriter(path, SETTINGS)
    images = SparseImages(
        patches=torch.arange(24, dtype=torch.uint8).reshape(3, 2, 4),
        positions=torch.tensor([[0, 1], [2, 1], [3, 0]]),
        labels=torch.zeros(3, dtype=torch.int64),
        stage=torch.zeros(3, dtype=torch.int64),
        trajectory=torch.arange(3),
    )
    writer.write(0, [images])
    if finished:
        writer.finish([{2: 3}])
    return path


def names(cache: Path) -> list[str]:
    return [entry.name for entry in list_cache(cache)]


def problem_of(path: Path) -> str | None:
    """Return the problem of the only dataset in a cache."""
    (entry,) = list_cache(path.parents[1])
    return entry.problem


def test_argument_names_the_cache() -> None:
    assert cache_directory("here") == Path("here")


def test_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFQ_CACHE", "there")
    assert cache_directory() == Path("there")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"HOME": "/home/me"}, "/home/me/.cache/dfq"),
        ("linux", {"HOME": "/home/me", "XDG_CACHE_HOME": "/xdg"}, "/xdg/dfq"),
        ("linux", {"HOME": "/home/me", "XDG_CACHE_HOME": ""}, "/home/me/.cache/dfq"),
        ("darwin", {"HOME": "/Users/me", "XDG_CACHE_HOME": "/xdg"}, "/Users/me/Library/Caches/dfq"),
        ("win32", {"HOME": "/me", "LOCALAPPDATA": "/local"}, "/local/dfq"),
        ("win32", {"HOME": "/me"}, "/me/AppData/Local/dfq"),
    ],
)
def test_default_is_the_users_cache_directory(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("DFQ_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_directory() == Path(expected)


def test_empty_environment_variable_does_not_name_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DFQ_CACHE", "")
    assert cache_directory() != Path("")


def test_cache_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list_cache(tmp_path / "missing") == []


def test_listing_tells_what_a_dataset_is(tmp_path: Path) -> None:
    path = add(tmp_path, "a")
    (entry,) = list_cache(tmp_path)
    assert (entry.name, entry.path) == ("a", str(path))
    assert (entry.model, entry.method, entry.images) == ("some_vit.tag", "smi", 3)
    assert entry.bytes == sum(p.stat().st_size for p in path.iterdir())
    assert entry.problem is None


def test_listing_is_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        add(tmp_path, name)
    assert names(tmp_path) == ["a", "b", "c"]


def test_listing_uses_the_environments_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, "a")
    monkeypatch.setenv("DFQ_CACHE", str(tmp_path))
    assert [entry.name for entry in list_cache()] == ["a"]


def test_files_beside_the_datasets_are_left_out(tmp_path: Path) -> None:
    add(tmp_path, "a")
    (tmp_path / "datasets" / "notes.txt").write_text("note")
    assert names(tmp_path) == ["a"]


def test_unfinished_dataset_is_listed_as_such(tmp_path: Path) -> None:
    add(tmp_path, "a", finished=False)
    (entry,) = list_cache(tmp_path)
    assert (entry.problem, entry.model, entry.images) == ("unfinished", "some_vit.tag", 0)


def test_directories_of_others_are_neither_listed_nor_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "datasets" / "imagenet"
    foreign.mkdir(parents=True)
    (foreign / "settings.json").write_text("{}")
    add(tmp_path, "a")
    assert [e.name for e in list_cache(tmp_path)] == ["a"]
    remove_cached("all", tmp_path)
    assert [p.name for p in (tmp_path / "datasets").iterdir()] == ["imagenet"]


def test_dataset_that_lost_its_settings_is_listed_with_the_reason(tmp_path: Path) -> None:
    path = add(tmp_path, "a")
    (path / "settings.json").unlink()
    assert "has no settings.json" in str(problem_of(path))


def test_malformed_manifest_is_listed_with_the_reason(tmp_path: Path) -> None:
    path = add(tmp_path, "a")
    (path / "manifest.json").write_text("{")
    assert "manifest.json" in str(problem_of(path))


@pytest.mark.parametrize("field", ["model", "inversion"])
@pytest.mark.parametrize("value", ["text", ["text"], None, 3])
def test_malformed_settings_are_listed_with_the_reason(
    tmp_path: Path, field: str, value: Any
) -> None:
    path = add(tmp_path, "a")
    (path / "settings.json").write_text(json.dumps({**SETTINGS, field: value}))
    assert problem_of(path) is not None


def test_absurd_number_of_images_is_listed_with_the_reason(tmp_path: Path) -> None:
    path = add(tmp_path, "a")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["images"] = manifest["shards"][0]["images"] = 10**30
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert problem_of(path) is not None


def test_bad_dataset_does_not_hide_the_good_ones(tmp_path: Path) -> None:
    add(tmp_path, "a")
    (add(tmp_path, "b") / "settings.json").write_text("[")
    add(tmp_path, "c")
    assert [e.problem is None for e in list_cache(tmp_path)] == [True, False, True]


def test_verification_passes_whole_datasets(tmp_path: Path) -> None:
    add(tmp_path, "a")
    assert verify_cache(tmp_path) == list_cache(tmp_path)


def test_verification_finds_damage_that_listing_does_not_look_for(tmp_path: Path) -> None:
    path = add(tmp_path, "a")
    content = bytearray((path / SHARD).read_bytes())
    content[-1] ^= 1
    (path / SHARD).write_bytes(content)
    assert problem_of(path) is None
    (entry,) = verify_cache(tmp_path)
    assert SHARD in str(entry.problem)


def test_verification_names_a_missing_shard(tmp_path: Path) -> None:
    (add(tmp_path, "a") / SHARD).unlink()
    (entry,) = verify_cache(tmp_path)
    assert SHARD in str(entry.problem)


def test_dataset_is_removed_by_name(tmp_path: Path) -> None:
    path = add(tmp_path, "a")
    add(tmp_path, "b")
    assert [entry.name for entry in remove_cached("a", tmp_path)] == ["a"]
    assert not path.exists()
    assert names(tmp_path) == ["b"]


def test_dataset_is_removed_by_the_start_of_its_name(tmp_path: Path) -> None:
    add(tmp_path, "vit-pri-32")
    add(tmp_path, "deit-pri-32")
    remove_cached("vit", tmp_path)
    assert names(tmp_path) == ["deit-pri-32"]


def test_whole_name_wins_over_the_start_of_another(tmp_path: Path) -> None:
    add(tmp_path, "vit")
    add(tmp_path, "vit-32")
    remove_cached("vit", tmp_path)
    assert names(tmp_path) == ["vit-32"]


def test_all_datasets_are_removed_together(tmp_path: Path) -> None:
    add(tmp_path, "a")
    add(tmp_path, "b", finished=False)
    assert [entry.name for entry in remove_cached("all", tmp_path)] == ["a", "b"]
    assert names(tmp_path) == []


def test_removing_all_of_an_empty_cache_removes_nothing(tmp_path: Path) -> None:
    assert remove_cached("all", tmp_path) == []


def test_ambiguous_name_removes_nothing(tmp_path: Path) -> None:
    add(tmp_path, "vit-1")
    add(tmp_path, "vit-2")
    with pytest.raises(DatasetError, match=r"2 entries .*vit-1, vit-2"):
        remove_cached("vit", tmp_path)
    assert names(tmp_path) == ["vit-1", "vit-2"]


@pytest.mark.parametrize("name", ["other", "t", "it-1", "../datasets/vit-1", "*"])
def test_unknown_name_removes_nothing(tmp_path: Path, name: str) -> None:
    add(tmp_path, "vit-1")
    with pytest.raises(DatasetError, match=r"No entry .*vit-1"):
        remove_cached(name, tmp_path)
    assert names(tmp_path) == ["vit-1"]


def test_empty_name_removes_nothing(tmp_path: Path) -> None:
    add(tmp_path, "vit-1")
    with pytest.raises(SettingError, match="name is empty"):
        remove_cached("", tmp_path)
    assert [entry.name for entry in list_cache(tmp_path)] == ["vit-1"]


def test_removal_that_fails_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, "a")

    def denied(*_: Any, **__: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", denied)
        with pytest.raises(OutputError, match="Permission denied"):
            remove_cached("a", tmp_path)


def test_nothing_is_removed_where_one_dataset_holds_a_file_of_the_user(tmp_path: Path) -> None:
    add(tmp_path, "a")
    (add(tmp_path, "b") / "notes.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"also holds 'notes\.txt'"):
        remove_cached("all", tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["linked", "all"])
def test_of_a_link_the_target_is_kept(tmp_path: Path, name: str) -> None:
    target = add(tmp_path / "elsewhere", "a")
    before = tree(target)
    add(tmp_path, "b")
    (tmp_path / "datasets" / "linked").symlink_to(target)
    assert names(tmp_path) == ["b", "linked"]
    remove_cached(name, tmp_path)
    assert names(tmp_path) == ([] if name == "all" else ["b"])
    assert tree(target) == before
