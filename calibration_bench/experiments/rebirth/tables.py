"""Tables of ``rebirth``."""

from __future__ import annotations

import statistics

from calibration_bench.core.registry import Row, Table
from calibration_bench.core.tables import TESTED, groups, mean_over_seeds, width
from calibration_bench.measure.variants import VARIANTS

COLUMNS = {
    "variant": "variant",
    "line": "what it does",
    "iterations": "T",
    "trajectories": "trajectories",
    "kilo_updates": "patch updates, thousands",
    "of_budget": "of pri's",
    "kept_at": "patches kept after iterations",
    "patches_kept": "patches kept",
    "seconds": "s to invert",
    "seeds": "seeds",
    "accuracy": "top-1, %",
    "agreement": "agreement, %",
    "kl": "KL",
    "kl_error": "± over seeds",
    "against": "KL - KL of pri, mean ± over seeds",
}

ABOUT = (
    *TESTED,
    "images",
    "stages",
    "bits",
    "reduce_range",
    "coverage",
    "budget",
    "threads",
    "precision",
    "float_accuracy",
)

NOTE = (
    "T of every variant is chosen so that all trajectories together make the same number of patch "
    "updates (an update: one step of Adam on one patch). The last column is the mean over seeds of "
    "the difference of KL from pri at the same seed, with its standard deviation: a difference "
    "smaller than that is chance. Variants differ in how many patches their images hold in all "
    "(*patches kept*), so in how many tokens calibration sees."
)


def rebirth_tables(rows: list[Row]) -> list[Table]:
    """Return tables for each setting, with a row for every variant."""
    tables: list[Table] = []
    for values, same in groups(rows, *ABOUT).items():
        about = dict(zip(ABOUT, values, strict=True))
        beside = "with coverage" if about["coverage"] else "inverted images alone"
        title = (
            f"{about['model']}, v = {about['stages']}, {width(about)}, {about['images']} "
            f"images, {beside}, tested on {about['test_images']} of {about['data']}, float top-1 "
            f"{100 * float(str(about['float_accuracy'])):.2f} %"
        )
        reference = {r["seed"]: float(r["kl"]) for r in same if r["variant"] == "pri"}
        means = [_row(part, reference) for part in groups(same, "variant").values()]
        tables.append(Table(title, COLUMNS, means, NOTE))
    return tables


def _row(rows: list[Row], reference: dict[int, float]) -> Row:
    first = rows[0]
    at = (first["first_kept_at"], first["last_kept_at"])
    return {
        **mean_over_seeds(rows),
        **{name: first[name] for name in ("variant", "trajectories", "patches_kept")},
        "line": VARIANTS[first["variant"]].line,
        "kilo_updates": first["patch_updates"] / 1e3,
        "of_budget": first["patch_updates"] / first["budget"],
        "kept_at": str(at[0]) if at[0] == at[1] else f"{at[0]} to {at[1]}",
        "against": _difference(rows, reference) if first["variant"] != "pri" else None,
    }


def _difference(rows: list[Row], reference: dict[int, float]) -> str | None:
    pairs = [float(r["kl"]) - reference[r["seed"]] for r in rows if r["seed"] in reference]
    if not pairs:
        return None
    error = f" ± {statistics.stdev(pairs):.2g}" if len(pairs) > 1 else ""
    return f"{statistics.mean(pairs):+.2g}{error}"
