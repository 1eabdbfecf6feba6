"""Students: their sparse forward, their training, their directories."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import dfq
from dfq.distillation.inherit import initialize, spaced_blocks
from dfq.distillation.student import tokens
from dfq.distillation.training import RECORDS, distance, divergence, random_contrast, rate
from dfq.errors import DfqError, OutputError, RunError, SettingError, WeightsError
from dfq.progress import Silent
from dfq.recipe import DistillationSettings, Recipe, sets_field
from dfq.sparse import Grid, patchify
from dfq.vit.load import load_model

INVERSION = {"iterations": 4, "precision": "float32", "threads": 1, "unit_size": 4}
TRAINING = {"batch": 8, "precision": "float32", "fractal": 4, "smooth": (1.0, 2.0)}
STUDENT = "vit_tiny_patch16_224"


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students of timm's name as small as the tests' teacher."""
    create = timm.create_model

    def made(**arguments: Any) -> Any:
        shape = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
        return create(**{**shape, **arguments})

    monkeypatch.setattr(timm, "create_model", made)


def distill(teacher: Any, out: Path, **changes: Any) -> dfq.DistillResult:
    given = {
        "student": STUDENT,
        "images": 16,
        "steps": 12,
        "settings": {"inversion": INVERSION, "distillation": TRAINING},
        "out": out,
    }
    return dfq.distill(teacher, **{**given, **changes})


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> VisionTransformer:
    small(monkeypatch)
    return make_vit()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reg_tokens": 3},
        {"no_embed_class": True, "init_values": 0.1},
        {"class_token": False, "global_pool": "avg"},
        {"pre_norm": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_student_sees_what_its_converted_form_sees(changes: dict[str, Any]) -> None:
    model = make_vit(**changes)
    vit = load_model(model, mean=(0.5,) * 3, std=(0.5,) * 3).vit
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[3, 0, 7, 12], [1, 2, 15, 5]])
    patches = patchify(images, vit.arch.grid)
    some = patches.gather(1, positions[..., None].expand(-1, -1, patches.shape[2]))
    expected = vit.forward_sparse(some, positions)
    torch.testing.assert_close(
        model.forward_head(tokens(model, some, positions)), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reg_tokens": 3},
        {"no_embed_class": True, "init_values": 0.1},
        {"class_token": False, "global_pool": "avg"},
        {"pre_norm": True, "qk_norm": True},
        {"qkv_bias": False},
    ],
    ids=str,
)
def test_a_student_of_the_teachers_depth_begins_as_the_teacher(changes: dict[str, Any]) -> None:
    teacher, other = make_vit(**changes), make_vit(seed=1, **changes)
    vit = load_model(teacher, mean=(0.5,) * 3, std=(0.5,) * 3).vit
    assert initialize(other, vit.arch, vit, "teacher") == "teacher"
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images), teacher.eval()(images))


def test_a_shallower_student_begins_with_blocks_of_the_teachers() -> None:
    teacher, other = make_vit(depth=5), make_vit(seed=1, depth=3)
    vit, arch = (load_model(m, mean=(0.5,) * 3, std=(0.5,) * 3).vit for m in (teacher, other))
    assert initialize(other, arch.arch, vit, "auto") == "teacher"
    for mine, index in zip(other.blocks, (0, 2, 4), strict=True):
        for name, value in teacher.blocks[index].state_dict().items():
            assert torch.equal(mine.state_dict()[name], value)


def test_what_does_not_fit_begins_with_random_weights() -> None:
    vit = load_model(make_vit(), mean=(0.5,) * 3, std=(0.5,) * 3).vit
    assert initialize(make_vit(seed=1), vit.arch, vit, "auto") == "random"
    for changes in ({"embed_dim": 48}, {"depth": 9}, {"act_layer": "silu"}, {"qkv_bias": False}):
        other = make_vit(seed=1, **{"depth": 1, **changes})
        arch = load_model(other, mean=(0.5,) * 3, std=(0.5,) * 3).vit.arch
        before = {k: v.clone() for k, v in other.state_dict().items()}
        assert initialize(other, arch, vit, "auto") == "random"
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
        with pytest.raises(SettingError, match="cannot start with its teacher's weights"):
            initialize(other, arch, vit, "teacher")


@given(count=st.integers(1, 40), more=st.integers(0, 40))
def test_blocks_are_spaced_evenly(count: int, more: int) -> None:
    actual = spaced_blocks(count, count + more)
    steps = [b - a for a, b in pairwise(actual)]
    assert len(actual) == count
    assert actual[-1] == count + more - 1
    assert not steps or (actual[0] == 0 and min(steps) >= 1 and max(steps) - min(steps) <= 1)


@given(seed=st.integers(0, 1000), contrast=st.floats(1, 64))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_contrast_keeps_the_order_of_pixels(seed: int, contrast: float) -> None:
    images = dfq.fractal_noise(3, Grid((28, 28), (2, 2), 1), first=seed)
    actual = random_contrast(images, contrast, torch.Generator().manual_seed(seed))
    assert torch.equal(actual.positions, images.positions)
    for before, after in zip(images.patches.flatten(1), actual.patches.flatten(1), strict=True):
        order = before.argsort(stable=True)
        assert bool((after[order].int().diff() >= 0).all())
    if contrast == 1:
        assert torch.equal(actual.patches, images.patches)


def test_tokens_that_differ_in_scale_alone_have_no_distance() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 64, generator=g), torch.randn(2, 4, 64, generator=g)
    assert float(distance(x, 3 * x + 1)) == pytest.approx(0, abs=1e-4)
    assert 1 < float(distance(x, y)) < 3


def test_the_loss_falls(teacher: VisionTransformer, tmp_path: Path) -> None:
    result = distill(teacher, tmp_path / "s", steps=300)
    assert len(result.losses) == RECORDS
    assert sum(result.losses[-10:]) < 0.7 * sum(result.losses[:10])


def test_the_same_seed_gives_the_same_bytes(teacher: VisionTransformer, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(teacher, tmp_path / name, seed=seed)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_student_is_a_model_for_every_verb(teacher: VisionTransformer, tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    data = tmp_path / "d.npz"
    np.savez(data, x=g.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), y=np.arange(12) % 5)
    result = distill(teacher, tmp_path / "s", eval=data)
    assert result.images == 12
    assert result.accuracy is not None
    assert 0 <= result.accuracy.student <= 1
    loaded = load_model(str(tmp_path / "s"))
    assert loaded.vit.arch.num_classes == 5
    assert loaded.preprocessing.mean == load_model(teacher).preprocessing.mean
    made = dfq.quantize(
        str(tmp_path / "s"),
        bits=8,
        images=8,
        out=tmp_path / "c",
        eval=data,
        settings={"inversion": INVERSION},
    )
    assert made.accuracy is not None
    assert made.accuracy.float == result.accuracy.student
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert report["agreement"] == result.agreement
    assert report["recipe"]["distillation"]["steps"] == 12


def test_a_student_is_replaced_and_nothing_else(teacher: VisionTransformer, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "s", steps=1)
    distill(teacher, tmp_path / "s", steps=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("x")
    with pytest.raises(OutputError, match="Nothing there was touched"):
        distill(teacher, tmp_path / "other")
    with pytest.raises(OutputError, match="is a file"):
        distill(teacher, tmp_path / "other" / "precious")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "vit_tiny_patch61_224"}, "no model of timm's"),
        ({"student": "resnet18"}, "resnet18"),
        ({"student": "beit_base_patch16_224"}, "cannot be a student|timm cannot build"),
        ({"width": 31}, "timm cannot build"),
        ({"depth": 0}, "depth is 0; a student has from 1 to 1024"),
        ({"width": 30, "heads": 4}, "multiple of 4"),
        ({"start": "scratch"}, "start is 'scratch'; allowed: auto, teacher, random"),
        ({"start": "teacher", "width": 48}, "its embed_dim is 48, the teacher's 64"),
        ({"student": None}, "named student"),
        ({"settings": {"quantization": {}}}, "known: inversion, distillation"),
        ({"steps": 0}, "steps is 0"),
    ],
    ids=str,
)
def test_mistakes_are_named(
    teacher: VisionTransformer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DfqError, match=message):
        distill(teacher, tmp_path / "s", **changes)
    assert not (tmp_path / "s").exists()


def test_another_patch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="the teacher into"):
        distill(make_vit(), tmp_path / "s", student="vit_tiny_patch16_224")


def test_a_teacher_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DfqError, match="no classifier"):
        distill(make_vit(num_classes=0), tmp_path / "s")


def test_a_loss_that_is_not_finite_ends_the_run(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(model: Any, *given: torch.Tensor) -> torch.Tensor:
        return tokens(model, *given) * torch.inf

    monkeypatch.setattr("dfq.distillation.training.tokens", diverged)
    with pytest.raises(RunError, match=r"step 0\. Lower lr"):
        distill(teacher, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_damaged_student_is_named(teacher: VisionTransformer, tmp_path: Path) -> None:
    distill(teacher, tmp_path / "s", steps=1)
    (tmp_path / "s" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_model(str(tmp_path / "s"))


def test_equal_predictions_have_no_divergence() -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert float(divergence(logits, logits + 3, 2.0)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(logits, logits.flip(1), 2.0)) > 0.1


@given(steps=st.integers(1, 500), warmup=st.floats(0, 1))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_step_size_rises_and_falls_within_its_bound(steps: int, warmup: float) -> None:
    plan = DistillationSettings(steps=steps, warmup=warmup)
    rates = [rate(step, plan) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0 <= r <= 1 for r in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_places_that_cannot_be_replaced_are_refused_before_training(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here, long = Path("."), Path("x" * 300)
    refused = ((here, OutputError, "the working directory"), (long, SettingError, "300 bytes"))
    for place, kind, message in refused:
        with pytest.raises(kind, match=message):
            distill(teacher, place, settings={"inversion": {}}, images=10_000_000)
    assert not list(tmp_path.iterdir())


def test_a_student_teaches_one_like_itself(tmp_path: Path) -> None:
    train = {"inversion": INVERSION, "distillation": TRAINING}
    shape: dict[str, Any] = {"depth": 2, "width": 32, "heads": 2}
    given: dict[str, Any] = {"images": 4, "steps": 1, "settings": train}
    first = dfq.distill("demo", **given, **shape, out=tmp_path / "first")
    second = dfq.distill(first.path, **given, depth=1, out=tmp_path / "second")
    arch = load_model(second.path).vit.arch
    assert (arch.depth, arch.embed_dim, arch.num_heads) == (1, 32, 2)
    assert arch.grid == load_model("demo").vit.arch.grid


def test_quantizing_with_a_recipe_for_distillation_keeps_none_of_it(tmp_path: Path) -> None:
    recipe = dfq.Recipe(distillation=DistillationSettings())
    settings = {"inversion": {**INVERSION, "images": 4}}
    made = dfq.quantize("demo", recipe=recipe, settings=settings, out=tmp_path / "c")
    assert "distillation" not in (Path(made.checkpoint) / "recipe.toml").read_text()
    assert "distillation" not in json.loads((Path(made.checkpoint) / "config.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a written student."""
    root = tmp_path_factory.mktemp("student")
    given = {"inversion": INVERSION, "distillation": TRAINING}
    dfq.distill(
        "demo", depth=2, width=32, heads=2, images=4, steps=1, settings=given, out=root / "s",
        cache=root / "cache",
    )  # fmt: skip
    return root / "s"


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("timm", {"checkpoint_path": "evil.pth"}),
    ("timm", {"pretrained_cfg": {"file": "evil.pth"}}),
    ("timm", {"scriptable": True}),
    ("timm", {"model_name": "hf-hub:timm/vit_tiny_patch16_224"}),
    ("timm", {"model_name": "local-dir:x"}),
    ("timm", {"model_name": "resnet18"}),
    ("timm", {"model_name": 5}),
    ("timm", {"num_heads": 0}),
    ("timm", {"num_heads": 7}),
    ("timm", {"depth": 10**6}),
    ("timm", {"embed_dim": True}),
    ("timm", {"img_size": [28, 28, 28]}),
    ("timm", {"mlp_ratio": "4"}),
    ("preprocessing", {"std": [0.0]}),
    ("preprocessing", {"mean": [0.5, 0.5, 0.5]}),
    ("preprocessing", {"crop_pct": 0}),
    ("preprocessing", {"interpolation": "tiles"}),
]


@pytest.mark.parametrize(("part", "change"), HOSTILE, ids=str)
def test_a_students_description_gives_a_shape_and_nothing_else(
    written: Path, tmp_path: Path, part: str, change: dict[str, Any]
) -> None:
    shutil.copytree(written, tmp_path / "s")
    config = json.loads((written / "model.json").read_text())
    config[part] |= change
    (tmp_path / "s" / "model.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"s' cannot be read: "):
        load_model(str(tmp_path / "s"))


@pytest.mark.parametrize("version", [1, 3, True, "2", None])
def test_a_student_of_another_format_is_refused(
    written: Path, tmp_path: Path, version: object
) -> None:
    shutil.copytree(written, tmp_path / "s")
    config = json.loads((written / "model.json").read_text())
    (tmp_path / "s" / "model.json").write_text(json.dumps({**config, "format_version": version}))
    with pytest.raises(WeightsError, match="format version"):
        load_model(str(tmp_path / "s"))


def test_a_flipped_bit_of_a_student_is_seen(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "s")
    content = bytearray((written / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "s" / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="SHA-256"):
        load_model(str(tmp_path / "s"))


def test_a_student_can_be_inspected(written: Path) -> None:
    facts = dfq.inspect(written)
    assert (facts["kind"], facts["architecture"]["depth"]) == ("student", 2)
    assert facts["report"]["path"] == str(written)


def test_a_student_does_not_replace_its_teacher(tmp_path: Path) -> None:
    effort: dict[str, Any] = {"images": 4, "iterations": 4, "steps": 1}
    first = dfq.distill("demo", depth=2, out=tmp_path / "first", **effort)
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="would replace its teacher"):
        dfq.distill(first.path, depth=1, out=tmp_path / "first", **effort)
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before
    notes: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    dfq.distill("demo", depth=1, out=tmp_path / "first", progress=Listening(), **effort)
    assert any("will be replaced" in text for text in notes)


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("[distillation]\nsteps = 3\n", False),
        ("[inversion]\niterations = 8\n", False),
        ("[inversion]\nimages = 8\n", True),
    ],
)
def test_a_recipe_says_images_or_leaves_them(tmp_path: Path, text: str, images: bool) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    assert sets_field(path, "images") is images
    assert sets_field(None, "images") is False
    assert sets_field(Recipe(), "images") is True
