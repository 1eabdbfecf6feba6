"""Tables of ``image-statistics``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import combinations

import torch

from calibration_bench.core.registry import Row, Table
from calibration_bench.core.tables import TESTED, by_file, groups
from calibration_bench.measure.similarity import spearman

ABOUT = (*TESTED, "precision", "threads")

FIDELITY = {
    "source": "method",
    "stage": "stage",
    "patches": "patches of a seed",
    "seeds": "seeds",
    "psnr_then": "PSNR to DMI at the same iteration, dB",
    "ssim_then": "SSIM",
    "psnr_end": "PSNR to DMI at the end, dB",
    "ssim_end": "SSIM, end",
}

FIDELITY_NOTE = (
    "There is no ground truth in data-free inversion: these figures say how far PRI's patches have "
    "come apart from those that DMI makes from the same noise, targets and jitter, not which are "
    "better. PSNR is over all kept patches of a stage, SSIM the mean over patches, each patch one "
    "window. Until the first patches leave, both methods are the same computation: *identical* is "
    "what has to stand at stage 1."
)

ACTIVATIONS = {
    "source": "source",
    "images": "images",
    "seeds": "seeds",
    "mean": "mean",
    "variance": "variance",
    "range": "range",
    "outside": "real range outside, %",
    "worst": "worst layer by mean",
}

ACTIVATIONS_NOTE = (
    "Inputs of the linear layers of all blocks, averaged over layers and seeds; 0 is the same as "
    "real images. *Mean*: length of the difference of means over that of the real standard "
    "deviations. *Variance*, *range*: sum over features of absolute differences over the sum of "
    "the real ones. *Outside*: how much of the features' ranges on real images lies outside their "
    "ranges on the source, which is what min-max calibration clips. The row "
    "*real* is other real images: what chance alone gives for so few images. Sparse images hold "
    "fewer tokens, which by itself narrows ranges."
)

RANKING_NOTE = (
    "Spearman's rank correlation of the importance of all patches of DMI's images (1: the same "
    "order, 0: chance), mean over trajectories. Between seeds: of all pairs of trajectories of two "
    "seeds, those made for the same class and all others."
)


def statistics_tables(rows: list[Row]) -> list[Table]:
    """Return tables of similarity to DMI and to real images, and of rankings, for each model."""
    tables: list[Table] = []
    for values, same in groups(rows, *ABOUT).items():
        about = dict(zip(ABOUT, values, strict=True))
        title = f"{about['model']}, {about['test_images']} real images of {about['data']}"
        kinds = groups(same, "kind")
        fidelity = _fidelity(kinds.get(("fidelity",), []))
        activations = _activations(kinds.get(("activations",), []))
        rankings = _rankings(kinds.get(("ranking",), []))
        columns = {"pair": "rankings compared", "seeds": "seeds", "value": "Spearman"}
        tables += [
            Table(f"Kept patches against DMI: {about['model']}", FIDELITY, fidelity, FIDELITY_NOTE),
            Table(f"Activations: {title}", ACTIVATIONS, activations, ACTIVATIONS_NOTE),
            Table(f"Stability of importance: {about['model']}", columns, rankings, RANKING_NOTE),
        ]
    return tables


def _name(row: Row) -> str:
    return f"{row['source']}, T = {row['iterations']}" if row["iterations"] else str(row["source"])


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _fidelity(rows: list[Row]) -> list[Row]:
    averaged: list[Row] = []
    for same in groups(rows, "source", "iterations", "trajectories").values():
        of = len(same[0]["stages"])
        for number in range(of):
            stages = [row["stages"][number] for row in same]
            row: Row = {
                name: _mean(stage[name] for stage in stages)
                for name in ("psnr_then", "ssim_then", "psnr_end", "ssim_end")
            }
            if all(stage["identical"] for stage in stages):
                row["psnr_then"] = "identical"
            averaged.append(
                {
                    **row,
                    "source": _name(same[0]),
                    "stage": f"{number + 1} of {of}",
                    "patches": stages[0]["patches"],
                    "seeds": len(same),
                }
            )
    return averaged


def _activations(rows: list[Row]) -> list[Row]:
    averaged: list[Row] = []
    for same in groups(by_file(rows), "source", "iterations", "images", "real").values():
        names = list(same[0]["layers"])
        means = {
            figure: {n: statistics.mean(row["layers"][n][figure] for row in same) for n in names}
            for figure in ("mean", "variance", "range", "outside")
        }
        row: Row = {figure: statistics.mean(means[figure].values()) for figure in means}
        worst = max(names, key=means["mean"].__getitem__)
        averaged.append(
            {
                **row,
                "outside": 100 * row["outside"],
                "source": _name(same[0]),
                "images": same[0]["images"],
                "seeds": len(same),
                "worst": f"block {int(worst.split('.')[0]) + 1}, {worst.split('.', 1)[1]}",
            }
        )
    return sorted(averaged, key=lambda row: float(row["mean"]))


def _rankings(rows: list[Row]) -> list[Row]:
    correlations: list[Row] = []
    for same in groups(rows, "iterations", "trajectories", "snapshots").values():
        count, total = len(same[0]["over_time"]), same[0]["iterations"]
        for number in range(count - 1):
            at = round((number + 1) * total / count)
            value = _mean(row["over_time"][number] for row in same)
            pair = f"attention after {at} iterations, after {total}"
            correlations.append({"pair": pair, "seeds": len(same), "value": value})
        for pair in same[0]["measures"]:
            value = _mean(row["measures"][pair] for row in same)
            correlations.append({"pair": f"by {pair}", "seeds": len(same), "value": value})
        for pair, value in _between_seeds(same).items():
            correlations.append({"pair": pair, "seeds": len(same), "value": value})
    return correlations


def _between_seeds(rows: list[Row]) -> dict[str, float | None]:
    """Return the rank correlation of attention between trajectories of different seeds."""
    values: dict[bool, list[float | None]] = {True: [], False: []}
    for a, b in combinations(rows, 2):
        for label, x in zip(a["labels"], a["attention"], strict=True):
            for other, y in zip(b["labels"], b["attention"], strict=True):
                values[label == other].append(spearman(torch.tensor(x), torch.tensor(y)))
    return {
        "attention of two seeds, same class": _mean(values[True]),
        "attention of two seeds, other classes": _mean(values[False]),
    }
