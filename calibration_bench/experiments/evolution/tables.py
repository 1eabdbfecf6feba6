"""Tables and plots of ``evolution``."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

from calibration_bench.core.registry import Curve, Plot, Row, Table
from calibration_bench.core.tables import TESTED, groups
from calibration_bench.measure.variants import VARIANTS

ABOUT = (*TESTED, "precision", "threads")

STAGES = {
    "source": "images",
    "stage": "stage",
    "count": "images of a seed",
    "seeds": "seeds",
    "confidence": "confidence, %",
    "confidence_error": "± over seeds",
    "top1": "of its class, %",
    "filled_confidence": "confidence, absent patches filled, %",
    "attention": "attention of kept patches / mean",
    "own": "cosine to class mean, last block",
    "others": "to other classes",
    "margin": "difference",
}

STAGES_NOTE = (
    "*Confidence*: mean probability that the float model gives the target class, of exactly the "
    "patches that the image holds. *Filled*: the same with the absent patches put in as patches of "
    "the data's mean color. *Cosine*: features of the pooled token after the last block against "
    "class means of one half of the real images; the row *real* is the other half. *Attention*: "
    "importance of the patches at the moment at which they leave, over the mean of all that are "
    "alive; 1 is chance, and the last stage is not ranked. *pri-random*, *pri-least*: random or "
    "the least important patches leave, so that what the choice of patches does can be told from "
    "what the time of leaving does."
)

LOSS_NOTE = (
    "Mean loss of a trajectory (without the prior) over each quarter of the iterations, as the "
    "optimizer sees it: on the live patches, under jitter. When patches leave, the model sees "
    "fewer."
)


def evolution_tables(rows: list[Row]) -> list[Table]:
    """Return tables by stage, of cosines by block, and of losses, for each model."""
    tables: list[Table] = []
    for values, same in groups(rows, *ABOUT).items():
        about = dict(zip(ABOUT, values, strict=True))
        title = f"{about['model']}, {about['test_images']} real images of {about['data']}"
        merged = _merged(same)
        tables.append(Table(f"By stage: {title}", STAGES, merged, STAGES_NOTE))
        tables.append(_blocks(f"Cosine to the own class's mean, by block: {title}", merged, "owns"))
        tables.append(_blocks(f"The same less that to other classes: {title}", merged, "margins"))
        tables.append(_losses(f"Loss: {title}", same))
    return tables


def _name(row: Row) -> str:
    if not row["iterations"]:
        return str(row["source"])
    of = len(row["stages"])
    v = f", v = {of}" if of > 1 and row["source"] in VARIANTS else ""
    return f"{row['source']}{v}, T = {row['iterations']}"


def _runs(rows: list[Row]) -> list[list[Row]]:
    """Group rows that differ only in their seed."""
    counted = [{**row, "of": len(row["stages"])} for row in rows]
    return list(groups(counted, "source", "iterations", "trajectories", "of").values())


def _merged(rows: list[Row]) -> list[Row]:
    """Return means over seeds of every stage of every source."""
    merged: list[Row] = []
    for same in _runs(rows):
        of = len(same[0]["stages"])
        for number in range(of):
            stages = [row["stages"][number] for row in same]
            means = {
                name: _mean([stage.get(name) for stage in stages])
                for name in ("confidence", "top1", "filled_confidence", "attention")
            }
            owns, others = (_by_block(stages, name) for name in ("own", "others"))
            margins = [
                None if a is None or b is None else a - b for a, b in zip(owns, others, strict=True)
            ]
            spread = [100 * stage["confidence"] for stage in stages]
            percent = {n: None if v is None else 100 * v for n, v in means.items()}
            merged.append(
                {
                    **percent,
                    "attention": means["attention"],
                    "source": _name(same[0]),
                    "stage": f"{number + 1} of {of}" if of > 1 else None,
                    "number": number + 1,
                    "count": stages[0]["images"],
                    "seeds": len(same),
                    "confidence_error": statistics.stdev(spread) if len(same) > 1 else None,
                    "owns": owns,
                    "margins": margins,
                    "own": owns[-1],
                    "others": others[-1],
                    "margin": margins[-1],
                }
            )
    return merged


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _by_block(stages: list[Row], name: str) -> list[float | None]:
    return [_mean(list(values)) for values in zip(*(s[name] for s in stages), strict=True)]


def _blocks(title: str, merged: list[Row], name: str) -> Table:
    columns: dict[str, str] = {"source": "images", "stage": "stage"}
    depth = len(merged[0][name])
    columns |= {f"block_{i}": f"block {i}" for i in range(1, depth + 1)}
    rows = [
        {
            "source": row["source"],
            "stage": row["stage"],
            **{f"block_{i}": value for i, value in enumerate(row[name], 1)},
        }
        for row in merged
    ]
    return Table(title, columns, rows)


def _losses(title: str, rows: list[Row]) -> Table:
    columns: dict[str, Any] = {"source": "method", "seeds": "seeds"}
    columns |= {f"q{i}": f"quarter {i} of T" for i in range(1, 5)}
    losses = []
    for same in _runs([r for r in rows if r["losses"]]):
        curve = _curve(same)
        edges = [round(i * len(curve) / 4) for i in range(5)]
        quarters = {
            f"q{i}": statistics.mean(curve[a:b])
            for i, (a, b) in enumerate(pairwise(edges), 1)
            if b > a
        }
        losses.append({"source": _name(same[0]), "seeds": len(same), **quarters})
    return Table(title, columns, losses, LOSS_NOTE)


def _curve(rows: list[Row]) -> list[float]:
    return [statistics.mean(values) for values in zip(*(r["losses"] for r in rows), strict=True)]


def evolution_plots(rows: list[Row]) -> list[Plot]:
    """Return plots of the loss over iterations and of cosine margins over blocks."""
    plots: list[Plot] = []
    for values, same in groups(rows, *ABOUT).items():
        model = values[0]
        runs = _runs([r for r in same if r["losses"]])
        losses = [
            Curve(_name(part[0]), [float(i) for i in range(1, len(c) + 1)], c)
            for part, c in ((part, _curve(part)) for part in runs)
        ]
        margins = [
            Curve(
                row["source"] if row["stage"] is None else f"{row['source']}, {row['stage']}",
                [float(i) for i in range(1, len(row["margins"]) + 1)],
                row["margins"],
            )
            for row in _merged(same)
            if None not in row["margins"]
        ]
        plots.append(
            Plot(
                f"evolution-loss-{model}",
                f"Loss of trajectories, {model}",
                "iteration",
                "cross-entropy",
                losses,
                log_y=True,
            )
        )
        plots.append(
            Plot(
                f"evolution-features-{model}",
                f"Features by stage, {model}",
                "block",
                "cosine to own class - to others",
                margins,
            )
        )
    return plots
