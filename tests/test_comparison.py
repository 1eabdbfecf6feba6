"""Accuracy and agreement, on logits that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfq.comparison import Accuracy, Comparison, compare, dense_batches, sparse_batches
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Preprocessing
from dfq.vit.convert import convert
from dfq.vit.load import LoadedModel


class Fixed:
    """Stands for a model: its logits are given, batch by batch."""

    def __init__(self, *batches: list[list[float]]) -> None:
        self.batches = [torch.tensor(b, dtype=torch.float32) for b in batches]


def run(
    quantized: Fixed, reference: Fixed | None, *labels: list[int] | None, advance: Any = None
) -> Comparison:
    batches: Any = [
        (lambda model, i=i: model.batches[i], None if y is None else torch.tensor(y))
        for i, y in enumerate(labels)
    ]
    ours: Any = quantized
    theirs: Any = reference
    return compare(ours, theirs, batches, advance)


def one_hot(*classes: int, count: int = 7) -> list[list[float]]:
    """Logits that fall from each class on, cyclically: 3 -> 3, 4, 5, 6, 0, 1, 2."""
    return [[-float((c - k) % count) for c in range(count)] for k in classes]


def test_top1_is_the_share_of_labels_that_come_first() -> None:
    found = run(Fixed(one_hot(0, 1, 2, 3)), None, [0, 1, 0, 0])
    assert found.quantized is not None
    assert found.quantized.top1 == 0.5


def test_top5_is_the_share_of_labels_among_the_first_five() -> None:
    found = run(Fixed(one_hot(0, 0, 0, 0)), None, [0, 4, 5, 6])
    assert found.quantized == Accuracy(top1=0.25, top5=0.5)


def test_top5_of_fewer_classes_counts_all_of_them() -> None:
    found = run(Fixed(one_hot(0, 1, count=3)), None, [2, 2])
    assert found.quantized == Accuracy(top1=0.0, top5=1.0)


def test_the_float_model_has_its_own_accuracy() -> None:
    found = run(Fixed(one_hot(0, 1)), Fixed(one_hot(0, 2)), [0, 1])
    assert (found.quantized, found.float) == (Accuracy(1.0, 1.0), Accuracy(0.5, 0.5))


def test_agreement_is_the_share_of_equal_first_classes() -> None:
    found = run(Fixed(one_hot(0, 1, 2, 3)), Fixed(one_hot(0, 1, 2, 6)), [6, 6, 6, 6])
    assert found.agreement == 0.75


def test_agreement_needs_no_labels() -> None:
    found = run(Fixed(one_hot(0, 1)), Fixed(one_hot(0, 2)), None)
    assert (found.agreement, found.float, found.quantized) == (0.5, None, None)


def test_without_a_float_model_there_is_no_agreement() -> None:
    found = run(Fixed(one_hot(0, 1)), None, [0, 1])
    assert (found.agreement, found.kl, found.float) == (None, None, None)


def test_without_images_there_is_nothing_to_say() -> None:
    assert run(Fixed(), Fixed()) == Comparison(0, "top1", None, None, 0.0, None, None)


def test_unlabelled_images_among_labelled_ones_leave_no_accuracy() -> None:
    model = Fixed(one_hot(0), one_hot(1))
    found = run(model, model, [0], None)
    assert (found.quantized, found.float, found.agreement) == (None, None, 1.0)


def test_kl_is_that_of_the_quantized_from_the_float_prediction() -> None:
    ours, theirs = [[math.log(0.5), math.log(0.5)]], [[math.log(0.9), math.log(0.1)]]
    found = run(Fixed(ours), Fixed(theirs), None)
    assert found.kl == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))


def test_kl_is_a_mean_over_images() -> None:
    ours, theirs = [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [5.0, 0.0]]
    single = run(Fixed(ours[1:]), Fixed(theirs[1:]), None).kl
    assert single is not None
    assert run(Fixed(ours), Fixed(theirs), None).kl == pytest.approx(single / 2)


def test_kl_does_not_change_with_a_shift_of_the_logits() -> None:
    ours = Fixed([[1.0, 2.0, 4.0]])
    shifted = Fixed([[101.0, 102.0, 104.0]])
    assert run(ours, shifted, None).kl == pytest.approx(0, abs=1e-6)


LOGITS = st.lists(
    st.lists(st.integers(-4, 4).map(float), min_size=6, max_size=6), min_size=1, max_size=9
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logits=LOGITS, data=st.data())
def test_batches_do_not_matter(logits: list[list[float]], data: st.DataObject) -> None:
    count = len(logits)
    labels = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    size = data.draw(st.integers(1, count))
    theirs = logits[::-1]
    starts = range(0, count, size)
    whole = run(Fixed(logits), Fixed(theirs), labels)
    parts = run(
        Fixed(*(logits[i : i + size] for i in starts)),
        Fixed(*(theirs[i : i + size] for i in starts)),
        *(labels[i : i + size] for i in starts),
    )
    assert (parts.images, parts.agreement) == (whole.images, whole.agreement)
    assert (parts.quantized, parts.float) == (whole.quantized, whole.float)
    assert parts.kl == pytest.approx(whole.kl, abs=1e-5)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logits=LOGITS)
def test_a_model_agrees_with_itself(logits: list[list[float]]) -> None:
    found = run(Fixed(logits), Fixed(logits), None)
    assert (found.agreement, found.kl) == (1.0, 0.0)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(logits=LOGITS, data=st.data())
def test_shares_lie_where_they_can(logits: list[list[float]], data: st.DataObject) -> None:
    count = len(logits)
    labels = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    found = run(Fixed(logits), Fixed(logits[::-1]), labels)
    assert found.quantized is not None
    assert found.kl is not None
    assert 0 <= found.quantized.top1 <= found.quantized.top5 <= 1
    assert found.kl > -1e-6


def test_progress_counts_images() -> None:
    seen: list[int] = []
    run(Fixed(one_hot(0, 1, 2), one_hot(3)), None, [0, 1, 2], [3], advance=seen.append)
    assert seen == [3, 1]


def test_half_precision_logits_are_compared_in_float32() -> None:
    ours, theirs = Fixed([[1.0, 2.0, 4.0]]), Fixed([[1.0, 2.0, 5.0]])
    expected = run(ours, theirs, None).kl
    ours.batches[0] = ours.batches[0].bfloat16()
    assert run(ours, theirs, None).kl == pytest.approx(expected, abs=1e-6)


def test_nothing_is_kept_for_gradients() -> None:
    seen: list[bool] = []

    def logits(_: Any) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.zeros(1, 3)

    model: Any = object()
    compare(model, model, [(logits, None)])
    assert seen == [False, False]


def test_whole_images_run_through_both_models() -> None:
    ours, theirs = convert(make_vit(seed=0), "a"), convert(make_vit(seed=1), "b")
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second = ours(images).argmax(-1), theirs(images).argmax(-1)
    batches = dense_batches([(images[:4], first[:4]), (images[4:], first[4:])], torch.device("cpu"))
    found = compare(ours, theirs, batches)
    agreement = float((first == second).float().mean())
    assert found.images == 6
    assert (found.quantized, found.agreement) == (Accuracy(1.0, 1.0), pytest.approx(agreement))


def test_batches_may_be_collected_before_they_are_run() -> None:
    vit = convert(make_vit(), "a")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = vit(images).argmax(-1)
    pairs = [(images[i : i + 1], labels[i : i + 1]) for i in range(4)]
    found = compare(vit, None, list(dense_batches(pairs, torch.device("cpu"))))
    assert found.quantized == Accuracy(1.0, 1.0)


def test_sparse_images_run_on_the_patches_they_have(loaded: LoadedModel) -> None:
    g = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (3, 5, 48), dtype=torch.uint8, generator=g)
    positions = torch.stack([torch.randperm(16, generator=g)[:5] for _ in range(3)])
    none = torch.zeros(3, dtype=torch.int64)
    images = SparseImages(patches, positions, none, none, none)
    p: Preprocessing = loaded.preprocessing
    x = pixels_to_input(patches, p, loaded.vit.arch.grid)
    ((logits, labels),) = sparse_batches([images], loaded.vit, p)
    assert labels is None
    assert torch.equal(logits(loaded.vit), loaded.vit.forward_sparse(x, positions))
