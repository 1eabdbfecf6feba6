"""The optimization loop and what it yields."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit

from dfq.inversion import Callback, Engine, plan_units
from dfq.inversion.importance import importance_of, resolve_importance
from dfq.inversion.objective import BinaryObjective, ClassObjective, DirectionObjective
from dfq.inversion.plateau import Plateau
from dfq.recipe import Importance, InversionSettings
from dfq.sparse import SparseImages, patchify, pixels_to_input
from dfq.vit.load import LoadedModel, load_model


def chosen(**changes: Any) -> InversionSettings:
    base = InversionSettings(iterations=8, images=8, precision="float32", threads=1, unit_size=2)
    return dataclasses.replace(base, **changes)


def run(loaded: LoadedModel, settings: InversionSettings) -> list[SparseImages]:
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    units = plan_units(settings, loaded.vit.arch.grid.patches)
    return [images for unit in units for images in engine.run(unit)]


def tensors(batches: list[SparseImages]) -> list[torch.Tensor]:
    return [t for b in batches for t in (b.patches, b.positions, b.labels, b.stage, b.trajectory)]


def same(a: list[SparseImages], b: list[SparseImages]) -> bool:
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("method", ["pri", "smi", "dmi", "noise"])
def test_same_seed_same_images(loaded: LoadedModel, method: str) -> None:
    settings = chosen(method=method)
    assert same(run(loaded, settings), run(loaded, settings))


def test_another_seed_gives_other_images(loaded: LoadedModel) -> None:
    assert not same(run(loaded, chosen(seed=0)), run(loaded, chosen(seed=1)))


def test_a_unit_does_not_depend_on_those_before_it(loaded: LoadedModel) -> None:
    settings = chosen(images=16)
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    units = plan_units(settings, 16)
    both = [engine.run(unit) for unit in units]
    alone = Engine(loaded.vit, loaded.preprocessing, settings).run(units[1])
    assert same(both[1], alone)


@pytest.mark.parametrize("stages", [1, 3, 4, 16])
def test_pri_images_of_a_trajectory_share_out_the_grid(loaded: LoadedModel, stages: int) -> None:
    batches = run(loaded, chosen(stages=stages, iterations=16, images=2 * stages))
    for trajectory in (0, 1):
        kept = torch.cat([b.positions[b.trajectory == trajectory].flatten() for b in batches])
        assert kept.sort().values.tolist() == list(range(16))


def test_smi_keeps_what_four_prunings_leave(loaded: LoadedModel) -> None:
    batches = run(loaded, chosen(method="smi", iterations=80, images=2))
    assert [b.patches.shape for b in batches] == [(2, 4, 48)]


@pytest.mark.parametrize("method", ["dmi", "noise"])
def test_dense_methods_keep_every_patch_in_place(loaded: LoadedModel, method: str) -> None:
    for batch in run(loaded, chosen(method=method)):
        assert batch.positions.tolist() == [list(range(16))] * len(batch)


def test_inversion_raises_the_target_class(loaded: LoadedModel) -> None:
    def confidence(batches: list[SparseImages]) -> float:
        shares = []
        for b in batches:
            p = loaded.preprocessing
            x = pixels_to_input(b.patches, p, loaded.vit.arch.grid)
            probabilities = loaded.vit.forward_sparse(x, b.positions).softmax(-1)
            shares.append(probabilities.gather(1, b.labels[:, None]))
        return float(torch.cat(shares).mean())

    before = confidence(run(loaded, chosen(method="noise", images=10)))
    after = confidence(run(loaded, chosen(method="dmi", images=10, iterations=60)))
    assert after > 0.9 > before


def test_targets_cover_classes_evenly_across_units() -> None:
    labels = [
        int(t) for first in range(0, 25, 5) for t in ClassObjective(3, first, 5, range(10)).labels
    ]
    assert sorted(labels[:10]) == list(range(10))
    assert sorted(labels[10:20]) == list(range(10))
    assert labels[:10] != labels[10:20]


def test_chosen_classes_come_in_turn(loaded: LoadedModel) -> None:
    batches = run(loaded, chosen(method="dmi", classes=(4, 1), iterations=1))
    labels = torch.cat([b.labels for b in batches]).tolist()
    assert [sorted(labels[i : i + 2]) for i in range(0, 8, 2)] == [[1, 4]] * 4


def test_all_classes_chosen_are_all_classes(loaded: LoadedModel) -> None:
    assert same(run(loaded, chosen()), run(loaded, chosen(classes=tuple(range(5)))))


def test_one_channel_and_bfloat16_work() -> None:
    gray = load_model(make_vit(in_chans=1), mean=[0.3], std=[0.3])
    batches = run(gray, chosen(precision="bfloat16"))
    assert {b.patches.shape[2] for b in batches} == {16}


def test_the_model_is_left_as_it_is(loaded: LoadedModel) -> None:
    before = {k: v.clone() for k, v in loaded.vit.state_dict().items()}
    run(loaded, chosen())
    assert all(torch.equal(v, before[k]) for k, v in loaded.vit.state_dict().items())


@torch.no_grad()
def last_attention(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, heads, T, T]`` of the last block of a model of ``make_vit``, by timm."""
    x = model._pos_embed(model.patch_embed(images))
    x = model.blocks[-1].norm1(model.blocks[:-1](x))
    qkv = model.blocks[-1].attn.qkv(x).reshape(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
    return (qkv[0] @ qkv[1].transpose(-2, -1) * 32**-0.5).softmax(-1)


def test_importance_is_the_class_tokens_attention_in_timm() -> None:
    model = make_vit()
    vit = load_model(model).vit
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    weights = last_attention(model, images)
    positions = torch.arange(16).expand(2, -1)
    actual = vit.importance(patchify(images, vit.arch.grid), positions)
    torch.testing.assert_close(actual, weights[:, :, 0, 1:].mean(1))


def test_importance_without_a_class_token_is_mean_attention() -> None:
    model = make_vit(class_token=False, global_pool="avg")
    vit = load_model(model).vit
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    weights = last_attention(model, images)
    positions = torch.arange(16).expand(2, -1)
    actual = vit.importance(patchify(images, vit.arch.grid), positions)
    torch.testing.assert_close(actual, weights.mean((1, 2)))


@pytest.mark.parametrize("measure", ["attention", "gradient", "activation", "random"])
def test_every_measure_of_importance_shares_out_the_grid(
    loaded: LoadedModel, measure: Importance
) -> None:
    batches = run(loaded, chosen(importance=measure, images=4))
    assert torch.cat([b.positions.flatten() for b in batches]).sort().values.tolist() == list(
        range(16)
    )
    assert same(batches, run(loaded, chosen(importance=measure, images=4)))


def test_gradient_and_activation_are_norms(loaded: LoadedModel) -> None:
    objective = ClassObjective(0, 0, 2, range(5))
    patches = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand(2, -1)

    def measured(measure: Importance) -> torch.Tensor:
        return importance_of(measure, loaded.vit, patches, positions, objective, torch.Generator())

    leaf = patches.clone().requires_grad_()
    logits = loaded.vit.forward_sparse(leaf, positions)
    logits[torch.arange(2), objective.labels].sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(measured("gradient"), leaf.grad.norm(dim=2))
    tokens = loaded.vit.tokens(patches, positions)
    torch.testing.assert_close(measured("activation"), tokens[:, 1:].norm(dim=2))


def test_auto_is_attention_where_a_token_pools() -> None:
    assert resolve_importance("auto", load_model(make_vit()).vit.arch) == "attention"
    averaged = load_model(make_vit(class_token=False, global_pool="avg")).vit
    assert resolve_importance("auto", averaged.arch) == "random"
    assert resolve_importance("gradient", averaged.arch) == "gradient"


def test_inversion_without_a_classifier_turns_features_to_their_directions() -> None:
    backbone = load_model(make_vit(num_classes=0))
    settings = chosen(method="dmi", images=4, unit_size=4, iterations=60)
    (images,) = run(backbone, settings)
    objective = DirectionObjective(0, 0, 4, 64)
    p = backbone.preprocessing
    x = pixels_to_input(images.patches, p, backbone.vit.arch.grid)
    cosines = F.cosine_similarity(
        backbone.vit.forward_sparse(x, images.positions), objective.directions
    )
    assert images.labels.tolist() == [0, 1, 2, 3]
    assert float(cosines.min()) > 0.3


def test_one_logit_is_inverted_towards_both_of_its_classes() -> None:
    model = load_model(make_vit(num_classes=1))
    (images,) = run(model, chosen(method="dmi", images=4, unit_size=4, iterations=60))
    p = model.preprocessing
    x = pixels_to_input(images.patches, p, model.vit.arch.grid)
    logits = model.vit.forward_sparse(x, images.positions)[:, 0]
    assert sorted(images.labels.tolist()) == [0, 0, 1, 1]
    assert ((logits > 0) == (images.labels == 1)).all()
    assert float(logits[images.labels == 1].min() - logits[images.labels == 0].max()) > 1


def test_the_score_of_one_logit_grows_towards_the_class() -> None:
    objective = BinaryObjective(0, 0, 2, range(2))
    logits = torch.tensor([[0.5], [2.0]])
    signs = 2 * objective.labels - 1
    assert float(objective.score(logits)) == float((signs * logits[:, 0]).sum())
    expected = -F.logsigmoid(signs * logits[:, 0]).sum()
    torch.testing.assert_close(objective.loss(logits), expected)


@pytest.mark.parametrize("classes", [(0,), (1, 0)])
def test_one_logit_has_two_classes_to_choose(classes: tuple[int, ...]) -> None:
    model = load_model(make_vit(num_classes=1))
    (images,) = run(model, chosen(method="dmi", images=2, classes=classes, iterations=2))
    assert set(images.labels.tolist()) == set(classes)


def test_directions_do_not_depend_on_the_unit() -> None:
    together = DirectionObjective(5, 0, 4, 8).directions
    torch.testing.assert_close(DirectionObjective(5, 2, 2, 8).directions, together[2:])


def test_a_plateau_ends_a_stage_and_counts_its_iterations(loaded: LoadedModel) -> None:
    settings = chosen(method="dmi", images=2, iterations=400, plateau=5)
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    steps: list[int] = []
    (unit,) = plan_units(settings, 16)
    (early,) = engine.run(unit, steps.append)
    assert sum(steps) == 400
    assert len(steps) < 400
    assert not same([early], run(loaded, chosen(method="dmi", images=2, iterations=400)))


def test_a_plateau_is_decided_by_each_unit_alone(loaded: LoadedModel) -> None:
    settings = chosen(images=16, iterations=200, plateau=4)
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    units = plan_units(settings, 16)
    both = [engine.run(unit) for unit in units]
    assert same(both[1], Engine(loaded.vit, loaded.preprocessing, settings).run(units[1]))


def test_plateau_compares_means_of_windows() -> None:
    falling = Plateau(2)
    assert [falling.reached(x) for x in (10, 8, 6, 8, 5, 6, 4, 5)] == [False] * 8
    flat = Plateau(2)
    assert [flat.reached(x) for x in (10, 8, 9, 9)] == [False, False, False, True]
    assert not any(Plateau(0).reached(1.0) for _ in range(100))


def test_the_last_snapshot_is_what_dmi_makes_without_any(loaded: LoadedModel) -> None:
    settings = chosen(method="dmi", images=2)
    (plain,) = run(loaded, settings)
    shots = run(loaded, dataclasses.replace(settings, snapshots=4, images=8))
    assert [s.stage.tolist() for s in shots] == [[k, k] for k in range(4)]
    assert torch.equal(shots[-1].patches, plain.patches)
    assert not torch.equal(shots[0].patches, plain.patches)


def test_a_snapshot_is_what_a_run_of_that_length_makes(loaded: LoadedModel) -> None:
    settings = chosen(method="dmi", images=2)
    (half,) = run(loaded, dataclasses.replace(settings, iterations=4))
    shots = run(loaded, dataclasses.replace(settings, snapshots=2, images=4))
    assert torch.equal(shots[0].patches, half.patches)


class Selections(Callback):
    """What the engine says while it runs."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, int]] = []
        self.chosen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_iteration(self, loss: torch.Tensor, positions: torch.Tensor) -> None:
        self.losses.append((float(loss), positions.shape[1]))

    def on_selection(
        self, importance: torch.Tensor, positions: torch.Tensor, leaving: torch.Tensor
    ) -> None:
        self.chosen.append((importance, positions, leaving))


@pytest.mark.parametrize("first", ["most", "least"])
def test_the_most_or_the_least_important_leave_first(loaded: LoadedModel, first: Any) -> None:
    settings = chosen(leave_first=first)
    engine = Engine(loaded.vit, loaded.preprocessing, settings)
    (unit,) = plan_units(settings, 16)
    callback = Selections()
    images = engine.run(unit, callback=callback)
    assert same(images, engine.run(unit))
    assert [live for _, live in callback.losses] == [16, 16, 12, 12, 8, 8, 4, 4]
    assert len(callback.chosen) == 3
    for (importance, positions, leaving), batch in zip(callback.chosen, images, strict=False):
        ranks = importance.argsort(dim=1).argsort(dim=1)
        kept = ranks.gather(1, leaving)
        live = importance.shape[1]
        assert int(kept.min()) == (live - 4 if first == "most" else 0)
        assert int(kept.max()) == (live - 1 if first == "most" else 3)
        assert torch.equal(positions.gather(1, leaving), batch.positions)
