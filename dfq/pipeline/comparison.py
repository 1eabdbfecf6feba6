"""Accuracy of a model, and agreement of two."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import methodcaller

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.results.intervals import mean_interval, share_interval
from dfq.results.values import Metric
from dfq.sparse import SparseImages, pixels_to_input
from dfq.vit import Architecture, Preprocessing, ViT
from dfq.vit.logits import class_logits

EVALUATION_BATCH = 50
"""Batch size of evaluation."""

CONSTANT = 1e-6
"""Largest relative spread of outputs over images that counts as rounding."""


def metric_of(arch: Architecture) -> Metric:
    """Return the metric of agreement for an architecture."""
    if arch.num_classes == 1:
        return "threshold"
    return "top1" if arch.num_classes else "cosine"


Number = float
"""Alias, as :class:`Comparison` has a field ``float``."""


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy, from 0 to 1."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of a quantized model with the float model on the same images.

    ``agreement`` as :data:`Metric` says, ``agreeing`` the images that it counts (None of a
    mean) and ``interval`` its 95 % interval.  ``kl`` is the mean Kullback-Leibler divergence of
    the quantized from the float prediction in nats, of one logit that of the two Bernoulli
    distributions; None without a classifier.  ``error_over_spread`` is the root mean square of
    the difference of the outputs over the standard deviation of the float outputs between
    images.  All are None without a float model; agreement and error also where the float
    outputs do not differ between images (``constant``), as any model would agree with them.

    Images on which an output is not finite (``not_finite``) do not agree, are not classified
    right, and have no part in ``kl`` and ``error_over_spread``.

    ``threshold`` is 0 for labeled images of which the float model puts some on either side;
    otherwise it lies midway between the two float logits about their median.  Accuracies are
    None without labels or classifier; of one logit, class 1 is a logit above 0.  ``seconds`` is
    the quantized model's own time.
    """

    images: int
    metric: Metric
    agreement: float | None
    kl: float | None
    seconds: float
    float: Accuracy | None
    quantized: Accuracy | None
    agreeing: int | None = None
    interval: tuple[Number, Number] | None = None
    threshold: Number | None = None
    error_over_spread: Number | None = None
    not_finite: int = 0
    constant: bool = False


Outputs = Callable[[nn.Module], Tensor]


@torch.inference_mode()
def compare(
    quantized: nn.Module,
    reference: nn.Module | None,
    batches: Iterable[tuple[Outputs, Tensor | None]],
    advance: Callable[[int], None] | None = None,
    *,
    metric: Metric = "top1",
) -> Comparison:
    """Run both models over batches, each a function from a model to its outputs, with labels.

    ``advance`` is called with the number of images after every batch.
    """
    count, seconds, labeled = 0, 0.0, metric != "cosine"
    hits, float_hits = _Hits(), _Hits()
    pairs = _Pairs(metric)
    for outputs, labels in batches:
        started = time.perf_counter()
        ours = outputs(quantized).float().cpu()
        seconds += time.perf_counter() - started
        count += len(ours)
        theirs = None if reference is None else outputs(reference).float().cpu()
        if theirs is not None:
            pairs.add(ours, theirs)
        labeled = labeled and labels is not None
        if labeled and labels is not None:
            hits.add(ours, labels)
            if theirs is not None:
                float_hits.add(theirs, labels)
        if advance is not None:
            advance(len(ours))
    compared = reference is not None and count > 0
    agreement = pairs.agreement(labeled) if compared else _Agreement()
    return Comparison(
        images=count,
        metric=metric,
        agreement=agreement.value,
        kl=pairs.kl if compared else None,
        seconds=seconds,
        float=float_hits.accuracy if labeled and compared else None,
        quantized=hits.accuracy if labeled and count else None,
        agreeing=agreement.agreeing,
        interval=agreement.interval,
        threshold=agreement.threshold,
        error_over_spread=pairs.error_over_spread if compared else None,
        not_finite=pairs.not_finite,
        constant=compared and pairs.constant,
    )


def split_at(logits: Tensor) -> float | None:
    """Return a threshold midway between the two different logits of ``[N]`` next to their median;
    None if all are equal."""
    ordered = logits.double().sort().values
    steps = (ordered[1:] > ordered[:-1]).nonzero()[:, 0] + 1
    if not len(steps):
        return None
    at = int(steps[(steps - len(ordered) / 2).abs().argmin()])
    return float((ordered[at - 1] + ordered[at]) / 2)


@dataclass(frozen=True)
class _Agreement:
    value: float | None = None
    agreeing: int | None = None
    interval: tuple[float, float] | None = None
    threshold: float | None = None


@dataclass
class _Hits:
    """Counts of labeled images with a correct top-1 and top-5 prediction."""

    images: int = 0
    first: int = 0
    five: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        logits = class_logits(logits)
        finite, places = _finite(logits), _places(logits, labels)
        self.images += len(labels)
        self.first += int(((places < 1) & finite).sum())
        self.five += int(((places < 5) & finite).sum())

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy(self.first / self.images, self.five / self.images)


@dataclass
class _Pairs:
    """Statistics of two models' outputs on the same images, accumulated batch by batch."""

    metric: Metric
    images: int = 0
    finite: int = 0
    divergence: float = 0.0
    squared_error: float = 0.0
    squares: float = 0.0
    total: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)
    """Per finite image: whether the classes agree, the cosine, or both logits."""

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        self.images += len(ours)
        finite = _finite(ours) & _finite(theirs)
        ours, theirs = ours[finite], theirs[finite]
        self.finite += len(ours)
        self.scores.append(_scores(ours, theirs, self.metric))
        if self.metric != "cosine":
            self.divergence += _divergence(class_logits(ours), class_logits(theirs))
        wide = theirs.double()
        self.squared_error += float((ours.double() - wide).square().sum())
        self.squares += float(wide.square().sum())
        self.total = wide.sum(0) + (0 if self.total is None else self.total)

    @property
    def not_finite(self) -> int:
        return self.images - self.finite

    @property
    def kl(self) -> float | None:
        return self.divergence / self.finite if self.finite and self.metric != "cosine" else None

    @property
    def _spread(self) -> float:
        """Return the squared distances of the float outputs from their mean, summed over images."""
        if self.total is None or not self.finite:
            return 0.0
        return max(0.0, self.squares - float(self.total.square().sum()) / self.finite)

    @property
    def constant(self) -> bool:
        """Whether the float outputs of several images are equal up to rounding."""
        return self.finite > 1 and self._spread <= CONSTANT**2 * self.squares

    @property
    def error_over_spread(self) -> float | None:
        if self.constant or not self._spread:
            return None
        return math.sqrt(self.squared_error / self._spread)

    def agreement(self, labeled: bool) -> _Agreement:
        """Return the agreement; None if the float outputs do not differ between images."""
        if self.constant:
            return _Agreement()
        scores = torch.cat(self.scores)
        if self.metric == "cosine":
            return self._mean(scores.double())
        if self.metric == "top1" or not self.finite:
            return self._share(int(scores.sum()))
        ours, theirs = scores.unbind(1)
        both_sides = 0 < int((theirs > 0).sum()) < len(theirs)
        threshold = 0.0 if labeled and both_sides else split_at(theirs)
        if threshold is None:
            return _Agreement()
        return self._share(int(((ours > threshold) == (theirs > threshold)).sum()), threshold)

    def _share(self, count: int, threshold: float | None = None) -> _Agreement:
        interval = share_interval(count, self.images)
        return _Agreement(count / self.images, count, interval, threshold)

    def _mean(self, cosines: Tensor) -> _Agreement:
        values = F.pad(cosines, (0, self.not_finite))
        mean = float(values.mean())
        deviation = float(values.std()) if len(values) > 1 else 0.0
        return _Agreement(mean, interval=mean_interval(mean, deviation, len(values), (-1.0, 1.0)))


def _finite(outputs: Tensor) -> Tensor:
    return outputs.isfinite().all(-1)


def _places(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each label's logit from 0, int64 ``[B]``; among equal logits the lowest
    class is first, as with ``argmax``."""
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1)


def _scores(ours: Tensor, theirs: Tensor, metric: Metric) -> Tensor:
    if metric == "top1":
        return ours.argmax(-1) == theirs.argmax(-1)
    if metric == "threshold":
        return torch.cat([ours, theirs], 1).double()
    return F.cosine_similarity(ours, theirs, dim=-1).clamp(-1, 1)


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))


def dense_batches(
    batches: Iterable[tuple[Tensor, Tensor | None]], device: torch.device
) -> Iterable[tuple[Outputs, Tensor | None]]:
    """Yield whole images and their labels for :func:`compare`."""
    for images, labels in batches:
        yield methodcaller("__call__", images.to(device)), labels


def sparse_batches(
    batches: Iterable[SparseImages], vit: ViT, preprocessing: Preprocessing
) -> Iterable[tuple[Outputs, Tensor | None]]:
    """Yield sparse images without labels for :func:`compare`."""
    for batch in batches:
        batch = batch.to(vit.prefix.device)
        x = pixels_to_input(batch.patches, preprocessing, vit.arch.grid)
        yield methodcaller("forward_sparse", x, batch.positions), None
