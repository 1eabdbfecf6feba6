"""Class folders and class maps, beside timm's own reader of image folders."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from timm.data import ImageNetInfo
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from dfq.data.image_files import (
    ClassNumbers,
    class_folders,
    map_classes,
    number_classes,
    read_class_map,
)
from dfq.errors import DataError


def made(root: Path, names: Sequence[str]) -> Path:
    """Create a folder with a class folder for each name, each with an image."""
    for name in random.Random(0).sample(names, len(names)):
        (root / name).mkdir(parents=True)
        (root / name / "x.png").touch()
    return root


def numbered(root: Path, classes: int | None = None) -> ClassNumbers:
    names = [folder.name for folder in class_folders(root)]
    return number_classes(names, len(names) if classes is None else classes, str(root))


# ---- without a map

ORDERS = {
    "numbers": [str(n) for n in range(1, 13)],
    "numbers from 0": [str(n) for n in range(11)],
    "numbers with zeros before": ["01", "2", "003", "10", "0020"],
    "words": ["truck", "airplane", "Bird", "cat"],
    "words and numbers": ["10", "9", "cat", "2b", "b2", "b10", "B3", "cat 1", "1"],
    "numbers in words": [f"class{n}" for n in (1, 2, 10, 11, 20)],
    "versions": ["v1.10", "v1.9", "v1.9.1", "v2"],
    "signs": ["-1", "-10", "-2", "_a", "a_", "a-b", "a b"],
    "other letters": ["ärger", "Zebra", "zebra2", "élan", "猫", "犬"],
    "digits of other scripts": ["۳", "۱۲", "2"],
    "synsets of a model of other classes": ["n02084071", "n01440764", "n02121620"],
}


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS.keys())
def test_folders_have_the_indices_that_timm_gives_them(names: list[str], tmp_path: Path) -> None:
    made(tmp_path, names)
    _, theirs = find_images_and_targets(str(tmp_path))
    assert numbered(tmp_path).index == theirs


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["1", "2", "10"], "number"),
        (["۳", "2"], "number"),
        (["1", "2", "10a"], "name"),
        (["a"], "name"),
    ],
)
def test_the_order_says_whether_all_names_are_numbers(
    names: list[str], order: str, tmp_path: Path
) -> None:
    assert numbered(made(tmp_path, names)).order == order


@settings(max_examples=60)
@example(names=["a2", "a10", "A3"])
@given(names=st.lists(st.text("aB019- .", min_size=1, max_size=5), min_size=1, unique=True))
def test_any_names_are_ordered_as_timm_orders_them(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = [name for name in names if not name.startswith(".")]
    assume(names and len({str(natural_key(name)) for name in names}) == len(names))
    root = made(tmp_path_factory.mktemp("names"), names)
    _, theirs = find_images_and_targets(str(root))
    assert numbered(root).index == theirs


@pytest.mark.parametrize(
    "names",
    [("1", "01"), ("cat", "Cat"), ("a2", "a02", "b"), ("²", "b")],
    ids=str,
)
def test_names_that_timm_does_not_order_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"whose order timm does not define.*class_map"):
        numbered(made(tmp_path, names))


def test_synsets_have_imagenets_indices_in_a_model_of_1000_classes(tmp_path: Path) -> None:
    names = ["n02084071", "n02121808", *ImageNetInfo().label_names()[::400]]
    known = names[2:]
    numbers = numbered(made(tmp_path / "known", known), classes=1000)
    assert numbers == ClassNumbers(dict(zip(known, (0, 400, 800), strict=True)), "imagenet synsets")
    with pytest.raises(DataError, match=r"5 class folders.*1000 classes.*not ImageNet synsets"):
        numbered(made(tmp_path / "unknown", names), classes=1000)


def test_a_thousand_other_folders_are_numbered_by_themselves(tmp_path: Path) -> None:
    names = [f"class {n}" for n in range(1000)]
    numbers = number_classes(random.Random(0).sample(names, 1000), 1000, str(tmp_path))
    assert numbers == ClassNumbers({name: n for n, name in enumerate(names)}, "name")


# ---- with a map


LINE = st.text("abZ 9_-\t.äß猫\u2028\x0b\x0c\x85", max_size=4)


@settings(max_examples=80)
@example(lines=["b", "", "a", "", ""], end="\r\n")
@example(lines=["a\x0cb", "c\u2028d"], end="\n")
@given(lines=st.lists(LINE, max_size=6), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_lines_have_the_indices_that_timm_gives_them(
    lines: list[str], end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = [line.strip() for line in lines if line.strip()]
    assume(names and len(set(names)) == len(names))
    path = tmp_path_factory.mktemp("map") / "classes.txt"
    path.write_bytes(end.join(lines).encode())
    theirs = {name: index for name, index in load_class_map(str(path)).items() if name}
    assert read_class_map(path, classes=6) == theirs


@pytest.mark.parametrize("folders", [["cat", "dog", "emu"], ["dog"]], ids=str)
@pytest.mark.parametrize("kind", [".txt", ".json", ".TXT"])
def test_mapped_folders_have_the_indices_that_timm_gives_them(
    kind: str, folders: list[str], tmp_path: Path
) -> None:
    lines = tmp_path / "classes.txt"
    lines.write_text("emu\nfox\ndog\ncat\n")
    path = tmp_path / f"other{kind}"
    named = {"emu": 0, "fox": 1, "dog": 2, "cat": 3}
    path.write_text(json.dumps(named) if kind == ".json" else lines.read_text())
    root = made(tmp_path / "data", folders)
    theirs, _ = find_images_and_targets(str(root), class_to_idx=load_class_map(str(lines)))
    ours = map_classes(folders, read_class_map(path, 4), str(root), str(path))
    assert ours.order == "class map"
    assert [ours.index[Path(file).parent.name] for file, _ in theirs] == [t for _, t in theirs]


def test_a_mark_of_byte_order_is_no_part_of_a_name(tmp_path: Path) -> None:
    for name, text in (("a.txt", "cat\ndog\n"), ("a.json", '{"cat": 0, "dog": 1}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_class_map(tmp_path / name, 2) == {"cat": 0, "dog": 1}


def test_a_pickled_map_is_refused_with_the_forms_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "classes.pkl"
    path.write_bytes(pickle.dumps({"cat": 0, "dog": 1}))
    assert load_class_map(str(path)) == {"cat": 0, "dog": 1}
    with pytest.raises(DataError, match=r"classes\.pkl' is pickled.*\.txt.*\.json"):
        read_class_map(path, 2)


BAD_MAPS = {
    "another ending": ("a.csv", "cat,0\n", r"ends in '\.csv'.*\.txt.*\.json"),
    "no ending": ("classes", "cat\n", r"ends in ''.*\.txt.*\.json"),
    "empty": ("a.txt", "", "names no class"),
    "blank lines": ("a.txt", "\n \n", "names no class"),
    "an empty object": ("a.json", "{}", "names no class"),
    "a name twice": ("a.txt", "cat\ndog\ncat\n", "the name 'cat' 2 times"),
    "a key twice": ("a.json", '{"cat": 0, "cat": 1}', "the name 'cat' 2 times"),
    "an index twice": ("a.json", '{"cat": 1, "dog": 1}', "the index 1 2 times"),
    "an index too high": ("a.json", '{"cat": 3}', "'cat' the index 3; the model has 3 classes"),
    "an index below 0": ("a.json", '{"cat": -1}', "'cat' the index -1"),
    "more lines than classes": ("a.txt", "a\nb\nc\nd\n", "'d' the index 3"),
    "a blank line that counts": ("a.txt", "a\n\n\nd\n", "'d' the index 3"),
    "a list": ("a.json", '["cat", "dog"]', "no JSON object"),
    "pairs": ("a.json", '[["cat", 0]]', "no JSON object"),
    "a number": ("a.json", "3", "no JSON object"),
    "nested": ("a.json", '{"cat": {"index": 0}}', "no JSON object"),
    "true": ("a.json", '{"cat": true}', "no JSON object"),
    "a float": ("a.json", '{"cat": 1.0}', "no JSON object"),
    "text": ("a.json", '{"cat": "0"}', "no JSON object"),
    "names by index": ("a.json", '{"0": "cat"}', "no JSON object"),
    "cut": ("a.json", '{"cat": 0', "not valid JSON"),
    "deep": ("a.json", '{"a":' * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD_MAPS.values(), ids=BAD_MAPS.keys())
def test_a_map_that_is_none_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_class_map(tmp_path / name, classes=3)
    assert repr(str(tmp_path / name)) in str(caught.value)


def test_a_map_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt' does not exist"):
        read_class_map(tmp_path / "gone.txt", 3)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt' cannot be read"):
        read_class_map(tmp_path / "folder.txt", 3)
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt' cannot be read.*utf-8"):
        read_class_map(tmp_path / "latin.txt", 3)
    os.symlink(tmp_path / "nowhere", tmp_path / "link.txt")
    with pytest.raises(DataError, match=r"link\.txt' does not exist"):
        read_class_map(tmp_path / "link.txt", 3)


def test_a_folder_that_is_not_in_the_map_is_refused() -> None:
    with pytest.raises(DataError, match=r"'cats', which.*m\.txt' does not name.*mean 'cat'"):
        map_classes(["cats"], {"cat": 0, "dog": 1}, "data", "m.txt")
    with pytest.raises(DataError, match=r"'x' \(and 1 more\)"):
        map_classes(["cat", "x", "y"], {"cat": 0}, "data", "m.txt")
