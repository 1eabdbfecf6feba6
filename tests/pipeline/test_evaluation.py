"""Agreement and accuracy of a whole model on the user's images: labels, class orders, advice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import typer.main
from conftest import make_vit
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typer.testing import CliRunner

import dfq
from dfq.cli.app import app
from dfq.errors import DataError, SettingError
from dfq.vit.load import load_model

FAST: dict[str, Any] = {"iterations": 2, "stages": 2, "threads": 1}
CLASSES = 5
PIXELS = np.random.default_rng(5).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def quantize(model: nn.Module, out: Path, **changes: Any) -> dfq.QuantizeResult:
    args: dict[str, Any] = {"images": 4, "settings": {"inversion": FAST}, "out": out}
    return dfq.quantize(model, **{**args, **changes})


@torch.no_grad()
def logits(model: VisionTransformer) -> Tensor:
    """Logits of the float model for the images as arrays."""
    p = load_model(model).preprocessing
    mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    return model((torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - mean) / std)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    """Model whose data config has no crop, so that files give the pixels of arrays."""
    model: Any = make_vit()
    model.pretrained_cfg = {"crop_pct": 1.0, "input_size": (3, 16, 16)}
    return model


@pytest.fixture(scope="module")
def classes(model: VisionTransformer) -> list[int]:
    return logits(model).argmax(-1).tolist()


@pytest.fixture(scope="module")
def checkpoint(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    quantize(model, root / "w8a8", cache=root / "cache")
    return root / "w8a8"


def npz(path: Path, y: list[int] | None = None) -> Path:
    arrays: dict[str, Any] = {} if y is None else {"y": np.array(y)}
    np.savez(path, x=PIXELS, **arrays)
    return path


def flat(root: Path) -> Path:
    """The images as files of one folder."""
    root.mkdir()
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(root / f"{number:03d}.png")
    return root


def sorted_into(root: Path, names: list[str], labels: list[int]) -> Path:
    """The images as files of class folders, whose names are those of the labels."""
    for name in names:
        (root / name).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(PIXELS, labels, strict=True)):
        Image.fromarray(pixels).save(root / names[label] / f"{number:03d}.png")
    return root


# ---- images without labels


def test_unlabeled_images_give_agreement_alone(
    model: VisionTransformer, classes: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    labeled = dfq.evaluate(checkpoint, data=npz(tmp_path / "y.npz", classes), float_model=model)
    for data in (npz(tmp_path / "x.npz"), flat(tmp_path / "folder")):
        evaluation = dfq.evaluate(checkpoint, data=data, float_model=model)
        assert (evaluation.agreement, evaluation.kl) == (labeled.agreement, labeled.kl)
        assert evaluation.agreement_on is not None
        assert evaluation.agreement_on.images == 40
        assert (evaluation.accuracy, evaluation.accuracy_top5, evaluation.class_order) == (
            None,
            None,
            None,
        )


def test_quantize_measures_agreement_on_unlabeled_images(
    model: VisionTransformer, tmp_path: Path
) -> None:
    for data in (npz(tmp_path / "x.npz"), flat(tmp_path / "folder")):
        result = quantize(model, tmp_path / "out", eval=data)
        assert result.agreement_on is not None
        assert (result.agreement_on.data, result.agreement_on.images) == (str(data), 40)
        assert result.agreement_on.agreeing == round(40 * (result.agreement or 0))
        assert (result.accuracy, result.class_order, result.agreement_outside) == (None, None, None)


def test_unlabeled_images_need_a_float_model(checkpoint: Path, tmp_path: Path) -> None:
    for data in (npz(tmp_path / "x.npz"), flat(tmp_path / "folder")):
        with pytest.raises(SettingError, match=r"Without labels in .*give float_model"):
            dfq.evaluate(checkpoint, data=data)


def test_unlabeled_images_have_no_accuracy_to_bound(
    model: VisionTransformer, checkpoint: Path, tmp_path: Path
) -> None:
    data = flat(tmp_path / "folder")
    match = r"min_accuracy needs labels; .*folder' has none: no class folders, or no y"
    with pytest.raises(SettingError, match=match):
        dfq.evaluate(checkpoint, data=data, float_model=model, min_accuracy=0.1)
    with pytest.raises(SettingError, match=match):
        quantize(model, tmp_path / "out", eval=data, min_accuracy=0.1)
    assert not (tmp_path / "out").exists()


# ---- orders of classes

NAMES = {
    "number": ["1", "2", "3", "10", "11"],
    "name": ["airplane", "bird", "Cat", "dog", "frog"],
}


@pytest.mark.parametrize("order", NAMES)
def test_results_say_how_folders_are_numbered(
    order: str, model: VisionTransformer, classes: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    data = sorted_into(tmp_path / "data", NAMES[order], classes)
    evaluation = dfq.evaluate(checkpoint, data=data, float_model=model)
    assert evaluation.class_order == order
    assert evaluation.accuracy is not None
    assert evaluation.accuracy.float == 1.0
    assert evaluation.accuracy.correct == evaluation.agreement_on.agreeing  # type: ignore[union-attr]
    made = quantize(model, tmp_path / "out", eval=data)
    assert (made.class_order, made.accuracy) == (order, evaluation.accuracy)


def test_results_say_that_a_class_map_numbers_folders(
    model: VisionTransformer, classes: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    names = ["e", "c", "a", "d", "b"]
    data = sorted_into(tmp_path / "data", names, classes)
    (tmp_path / "map.txt").write_text("\n".join(names))
    (tmp_path / "map.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    wrong = dfq.evaluate(checkpoint, data=data, float_model=model)
    assert wrong.class_order == "name"
    assert wrong.accuracy is not None
    assert wrong.accuracy.float is not None
    assert wrong.accuracy.float < 0.5
    for file in ("map.txt", "map.json"):
        evaluation = dfq.evaluate(
            checkpoint, data=data, float_model=model, class_map=tmp_path / file
        )
        assert evaluation.class_order == "class map"
        assert evaluation.accuracy is not None
        assert evaluation.accuracy.float == 1.0
        made = quantize(model, tmp_path / "out", eval=data, class_map=tmp_path / file)
        assert (made.class_order, made.accuracy) == ("class map", evaluation.accuracy)


def test_results_say_that_labels_are_an_arrays(
    classes: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    evaluation = dfq.evaluate(checkpoint, data=npz(tmp_path / "y.npz", classes))
    assert evaluation.class_order == "y"


def test_a_student_says_how_its_folders_are_numbered(small_weights: Path, tmp_path: Path) -> None:
    data = sorted_into(tmp_path / "data", list("edcba"), [n % CLASSES for n in range(40)])
    (tmp_path / "map.txt").write_text("e\nd\nc\nb\na")

    def distill(**changes: Any) -> dfq.DistillResult:
        settings: dict[str, Any] = {"inversion": FAST, "distillation": {"batch": 4}}
        return dfq.distill(
            "test_vit", weights=small_weights, img_size=32, images=4, steps=1, settings=settings,
            out=tmp_path / "out", eval=data, **changes,
        )  # fmt: skip

    assert distill().class_order == "name"
    assert distill(class_map=tmp_path / "map.txt").class_order == "class map"


@pytest.mark.parametrize("data", ["x.npz", "demo"])
def test_a_class_map_is_of_folders(data: str, checkpoint: Path, tmp_path: Path) -> None:
    npz(tmp_path / "x.npz", [0] * 40)
    given = tmp_path / data if data == "x.npz" else data
    (tmp_path / "map.txt").write_text("a\nb")
    with pytest.raises(DataError, match=r"A class map numbers class folders; .* is no folder"):
        dfq.evaluate(checkpoint, data=given, class_map=tmp_path / "map.txt")


def test_a_class_map_without_class_folders_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("a\nb")
    with pytest.raises(DataError, match="has no class folders"):
        dfq.evaluate(checkpoint, data=flat(tmp_path / "f"), class_map=tmp_path / "map.txt")


def test_a_class_map_is_of_data_and_of_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("a\nb")
    with pytest.raises(SettingError, match=r"class_map numbers the class folders of eval"):
        quantize(make_vit(), tmp_path / "out", class_map=tmp_path / "map.txt")
    with pytest.raises(SettingError, match=r"class_map needs a classifier"):
        quantize(
            make_vit(num_classes=0), tmp_path / "out",
            eval=flat(tmp_path / "f"), class_map=tmp_path / "map.txt",
        )  # fmt: skip


# ---- one logit


@pytest.fixture(scope="module")
def binary() -> VisionTransformer:
    """Model with one logit that is above 0 for about half of the images."""
    model: Any = make_vit(num_classes=1)
    model.pretrained_cfg = {"crop_pct": 1.0, "input_size": (3, 16, 16)}
    with torch.no_grad():
        ordered = logits(model)[:, 0].sort().values
        model.head.bias -= (ordered[19] + ordered[20]) / 2
    return model


def test_two_class_folders_are_the_classes_of_one_logit(
    binary: VisionTransformer, tmp_path: Path
) -> None:
    right = (logits(binary)[:, 0] > 0).long().tolist()
    assert sum(right) == 20
    data = sorted_into(tmp_path / "data", ["no", "yes"], right)
    result = quantize(binary, tmp_path / "out", eval=data)
    assert result.accuracy is not None
    assert result.agreement_on is not None
    assert (result.accuracy.float, result.class_order) == (1.0, "name")
    assert (result.agreement_on.metric, result.agreement_on.threshold) == ("threshold", 0.0)
    assert result.accuracy.correct == result.agreement_on.agreeing
    again = dfq.evaluate(tmp_path / "out", data=data, float_model=binary)
    assert (again.accuracy, again.metric) == (result.accuracy, "threshold")
    swapped = sorted_into(tmp_path / "swapped", ["yes", "no"], [1 - label for label in right])
    (tmp_path / "map.json").write_text('{"yes": 1, "no": 0}')
    for class_map in (None, tmp_path / "map.json"):
        result = quantize(binary, tmp_path / "out", eval=swapped, class_map=class_map)
        assert result.accuracy is not None
        assert result.accuracy.float == 1.0


def test_unlabeled_images_of_one_logit_are_halved(
    binary: VisionTransformer, tmp_path: Path
) -> None:
    comparison = quantize(binary, tmp_path / "out", eval=npz(tmp_path / "x.npz")).agreement_on
    assert comparison is not None
    ordered = logits(binary)[:, 0].sort().values
    assert comparison.threshold is not None
    assert ordered[19] < comparison.threshold < ordered[20]


def test_other_classes_than_two_are_not_those_of_one_logit(
    binary: VisionTransformer, tmp_path: Path
) -> None:
    three = sorted_into(tmp_path / "three", ["a", "b", "c"], [0] * 40)
    with pytest.raises(DataError, match="3 class folders, but the model has 2 classes"):
        quantize(binary, tmp_path / "out", eval=three)
    with pytest.raises(DataError, match=r"labels from 0 to 2, but the model has 2 classes"):
        quantize(binary, tmp_path / "out", eval=npz(tmp_path / "y.npz", [0, 2] * 20))


# ---- advice


def options(verb: str) -> set[str]:
    command: Any = typer.main.get_command(app)
    return {name for p in command.commands[verb].params for name in p.opts}


def initialized(**changes: Any) -> dict[str, Tensor]:
    """Weights of timm's test model as it is made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_vit", **changes).state_dict()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, small_weights: Path) -> dict[str, Path]:
    """A checkpoint, and weights of other models than its own."""
    root = tmp_path_factory.mktemp("files")
    own = load_file(small_weights)
    states = {
        "partial": {k: v for k, v in own.items() if k != "norm.weight"},
        "headless": {k: v for k, v in own.items() if not k.startswith("head.")},
        "classes": initialized(img_size=32, num_classes=7),
        "larger": initialized(img_size=64, num_classes=CLASSES),
    }
    paths = {name: root / f"{name}.safetensors" for name in (*states, "damaged", "missing")}
    for name, state in states.items():
        save_file(state, paths[name])
    paths["damaged"].write_bytes(b"damaged")
    dfq.quantize(
        "test_vit", weights=small_weights, img_size=32, images=4, settings={"inversion": FAST},
        out=root / "checkpoint", cache=root / "cache",
    )  # fmt: skip
    return {**paths, "own": small_weights, "checkpoint": root / "checkpoint"}


OTHER_MODELS = [
    "--float vit_bsae",
    "--float resnet18",
    "--float vit_wee_patch16_reg1_gap_256",
    "--float vit_tiny_patch16_224",
    "--float vit_tiny_patch16_224.none",
    "--float demo",
    "--float test_vit",
    "--float test_vit --weights {missing}",
    "--float test_vit --weights {damaged}",
    "--float test_vit --weights {partial}",
    "--float test_vit --weights {headless}",
    "--float test_vit --weights {classes}",
    "--float test_vit --weights {larger} --img-size 64",
    "--float test_vit --weights {own} --img-size 3",
    "--float test_vit --weights {own} --img-size 99999",
    "--float vit_tiny_patch16_224 --weights {own}",
    "--float beit_base_patch16_224 --weights {own}",
    "--float demo --img-size 32",
    "--float demo --weights {own}",
    "--weights {own}",
    "--img-size 32",
    "--min-agreement 0.1",
    "--backend cublas",
]
"""Float models that ``evaluate`` refuses for a checkpoint of ``test_vit`` at 32 pixels."""


@pytest.mark.parametrize("words", OTHER_MODELS)
def test_evaluate_advises_only_options_that_it_has(
    words: str, files: dict[str, Path], labeled_npz: Path
) -> None:
    texts = ["evaluate", str(files["checkpoint"]), "--data", str(labeled_npz)]
    texts += words.format(**files).split()
    ended = CliRunner().invoke(app, texts)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: ")
    advised = set(re.findall(r"--[a-z][a-z-]+", ended.stderr))
    assert advised <= options("evaluate"), ended.stderr


def test_a_model_with_a_classifier_is_not_that_of_a_checkpoint_without(tmp_path: Path) -> None:
    quantize(make_vit(num_classes=0), tmp_path / "out")
    match = r"another architecture than the checkpoint: .*num classes 5 instead of 0"
    with pytest.raises(SettingError, match=match):
        dfq.evaluate(tmp_path / "out", data=npz(tmp_path / "x.npz"), float_model=make_vit())


def test_a_student_with_a_classifier_is_not_that_of_a_checkpoint_without(
    small_weights: Path, tmp_path: Path
) -> None:
    distilled = dfq.distill(
        "test_vit", weights=small_weights, img_size=32, images=4, steps=1, out=tmp_path / "student",
        settings={"inversion": FAST, "distillation": {"batch": 4}},
    )  # fmt: skip
    dfq.quantize(
        "test_vit", weights=small_weights, img_size=32, num_classes=0, images=4,
        settings={"inversion": FAST}, out=tmp_path / "out",
    )  # fmt: skip
    data = npz(tmp_path / "x.npz")
    with pytest.raises(SettingError, match="num classes 5 instead of 0") as caught:
        dfq.evaluate(tmp_path / "out", data=data, float_model=distilled.path)
    advised = set(re.findall(r"--[a-z][a-z-]+", str(caught.value)))
    assert advised <= options("evaluate")
