"""Tables of stored rows, as pure functions of JSON values."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from calibration_bench.core.registry import Curve, Plot, Row, Table

SPEED = {
    "implementation": "implementation",
    "method": "method",
    "seconds_per_image": "s / image",
    "against_official_dmi": "times faster than official DMI",
    "against_official_smi": "than official SMI",
    "against_own_dmi": "than its own DMI",
    "peak_memory_mb": "peak memory, MB",
    "process_peak_mb": "whole process, MB",
    "tflops": "TFLOP/s",
    "spread": "spread",
    "batch": "batch",
    "precision": "precision",
    "session": "session",
}

CHECKS = {
    "model": "model",
    "implementation": "implementation",
    "method": "method",
    "iterations": "iterations",
    "predicted_seconds_per_image": "predicted s / image",
    "actual_seconds_per_image": "actual",
    "error": "predicted / actual - 1",
    "spread": "spread",
}

FLOOR = {
    "method": "method",
    "live": "live patches",
    "gflop": "GFLOP",
    "unfused_mb": "MB, unfused",
    "possible_ms": "possible, ms",
    "achieved_ms": "achieved, ms",
    "achieved_over_possible": "achieved / possible",
    "achieved_tflops": "achieved TFLOP/s",
    "needed_tflops": "of the shapes alone",
    "best_tflops": "of large squares",
    "where": "where the time goes",
}


GPU_PARTS = {
    "gptq": {
        "outputs": "outputs",
        "inputs": "inputs",
        "equal_share": "integers as on the CPU",
        "equal_channels": "channels as on the CPU",
        "equal_scales": "scales as on the CPU",
        "error_ratio": "error / CPU's",
        "seconds": "s",
        "factor_seconds": "of these the factor",
        "search_seconds": "search of scales, s",
        "launches": "kernels",
        "triton_failure": "why not in Triton",
        "error": "error",
    },
    "iteration": {
        "batch": "trajectories",
        "live": "live patches",
        "seconds": "s / iteration",
        "gradient_seconds": "forward and gradient, s",
        "over_gradient": "iteration / these",
        "eager_seconds": "eager, s",
        "eager_over_graph": "eager / graph",
        "equal_to_eager": "bytes of eager",
        "eager_repeats": "eager repeats itself",
        "fallbacks": "fallbacks",
        "error": "error",
    },
    "quantize": {
        "bits": "bits",
        "turn": "turn",
        "invert": "invert, s",
        "calibrate": "calibrate",
        "quantize": "quantize",
        "evaluate": "evaluate",
        "without_loading": "all but loading",
        "peak_memory_mb": "peak memory, MB",
        "error": "error",
    },
    "inference": {
        "bits": "bits",
        "batch": "images",
        "dfq": "dfq, images/s",
        "dfq_eager": "without graphs",
        "dfq_compiled": "compiled",
        "torch_bf16": "bfloat16",
        "torch_bf16_compiled": "bfloat16 compiled",
        "over_bf16": "dfq / bfloat16",
        "graphs_over_eager": "graphs / eager",
        "peak_memory_mb": "peak memory, MB",
        "absent": "absent",
        "error": "error",
    },
    "inversion": {
        "implementation": "implementation",
        "batch": "trajectories",
        "method": "method",
        "seconds_per_image": "s / image",
        "against_official_dmi": "times faster than official DMI",
        "against_official_smi": "than official SMI",
        "against_own_dmi": "than its own DMI",
        "against_own_smi": "than its own SMI",
        "error": "error",
    },
}


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by their values in some columns, in the order of first appearance."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return grouped


def by_file(rows: Iterable[Row]) -> list[Row]:
    """Rows whose ``real`` is the file of the real images, without the digest of those drawn."""
    return [{**row, "real": (row.get("real") or "").rsplit(" ", 1)[0]} for row in rows]


def speed_tables(rows: list[Row]) -> list[Table]:
    """Return a table for each model and trajectory setting, and one of the checks."""
    races = groups(
        (row for row in rows if row["kind"] == "speed"), "model", "iterations", "threads", "device"
    )
    tables = [
        Table(
            f"{model}, T = {iterations}, {threads} threads, {device}",
            SPEED,
            [_compared(row, same) for row in same],
        )
        for (model, iterations, threads, device), same in races.items()
    ]
    checks = [row for row in rows if row["kind"] == "check"]
    return [*tables, Table("Extrapolation against whole runs", CHECKS, checks)]


def _compared(row: Row, others: list[Row]) -> Row:
    """Return a row with its speed-ups over other implementations and methods."""

    def against(implementation: str, method: str) -> float | None:
        own = {"precision": row["precision"]} if implementation == row["implementation"] else {}
        wanted = {"implementation": implementation, "method": method, **own}
        for other in others:
            if all(other[name] == value for name, value in wanted.items()):
                return float(other["seconds_per_image"]) / float(row["seconds_per_image"])
        return None

    return {
        **row,
        "against_official_dmi": against("official", "dmi"),
        "against_official_smi": against("official", "smi"),
        "against_own_dmi": against(row["implementation"], "dmi"),
    }


def gpu_tables(rows: list[Row]) -> list[Table]:
    """Return a table for each part of ``gpu-check``, model and device."""
    return [
        Table(f"{part}: {model}, {device}, {precision}", GPU_PARTS[part], _part(part, same))
        for (part, model, device, precision), same in groups(
            rows, "part", "model", "device", "precision"
        ).items()
    ]


def _part(part: str, rows: list[Row]) -> list[Row]:
    if part != "inversion":
        return rows
    pairs = [(who, method) for who in ("official", "own") for method in ("dmi", "smi")]
    return [
        {**row, **{f"against_{w}_{m}": _ratio(row, rows, w, m) for w, m in pairs}} for row in rows
    ]


def _ratio(row: Row, rows: list[Row], who: str, method: str) -> float | None:
    """Return the speed-up over another implementation and method at the same batch size."""
    whose = row["implementation"] if who == "own" else who
    for other in rows:
        setting = other["implementation"], other["method"], other["batch"]
        if setting == (whose, method, row["batch"]) and "seconds_per_image" in other:
            own = row.get("seconds_per_image")
            return None if own is None else float(other["seconds_per_image"]) / float(own)
    return None


def floor_tables(rows: list[Row]) -> list[Table]:
    """Return a table for each model."""
    grouped = groups(rows, "model", "batch", "precision", "threads")
    return [
        Table(
            f"{model}: an iteration of {batch} trajectories, {precision}, {threads} threads",
            FLOOR,
            [_floor(row) for row in same],
        )
        for (model, batch, precision, threads), same in grouped.items()
    ]


def _floor(row: Row) -> Row:
    precision = row["precision"]
    top = sorted(row["shares"].items(), key=lambda item: -item[1])[:7]
    return {
        **row,
        "gflop": row["operations"] / 1e9,
        "possible_ms": 1e3 * row["possible_seconds"],
        "achieved_ms": 1e3 * row["achieved_seconds"],
        "needed_tflops": row["operations"] / row[f"matmul_seconds_{precision}"] / 1e12,
        "best_tflops": row[f"best_tflops_{precision}"],
        "where": ", ".join(f"{name} {share:.0%}" for name, share in top),
    }


SWEEP = {
    "method": "method",
    "iterations": "iterations",
    "seeds": "seeds",
    "seconds": "s to invert",
    "accuracy": "top-1, %",
    "accuracy_error": "± over seeds",
    "float_accuracy": "float top-1, %",
    "agreement": "agreement, %",
    "kl": "KL",
    "kl_error": "± over seeds",
}

KNEES = {
    "method": "method",
    "best_accuracy": "best mean top-1, %",
    "best_iterations": "at iterations",
    "knee_iterations": "within 0.2 points from",
    "knee_seconds": "s to invert",
    "best_kl": "least mean KL",
    "kl_iterations": "within 10 % from",
    "kl_seconds": "s to invert, KL",
    "verdict": "differences over iterations against the spread over seeds",
}

POINTS, SHARE = 0.2, 0.1
"""Tolerance of the knee: percentage points of accuracy, relative increase of the KL."""


TESTED = ("model", "fingerprint", "data", "data_digest", "test_images")
"""Columns that identify model, bits and test images."""


def weight_range(about: Row) -> str:
    """Describe the range of the integer weights."""
    return f"weights {'within -64..63' if about['reduce_range'] else 'of the full range'}"


def width(about: Row) -> str:
    """Describe the bits of weights and activations, and the range of the weights."""
    return f"W{about['bits']}A8, {weight_range(about)}"


QUALITY = (
    *TESTED,
    "images",
    "bits",
    "reduce_range",
    "threads",
    "precision",
)


def quality_tables(rows: list[Row]) -> list[Table]:
    """Return, for each model and test set, the sweep averaged over seeds, and the knees."""
    tables: list[Table] = []
    for values, same in groups(rows, *QUALITY).items():
        about = dict(zip(QUALITY, values, strict=True))
        title = (
            f"{about['model']}, {width(about)}, {about['images']} images inverted by "
            f"{about['threads']} threads, tested on {about['test_images']} of {about['data']}"
        )
        means = [mean_over_seeds(part) for part in groups(same, "method", "iterations").values()]
        means.sort(key=lambda row: (row["method"], row["iterations"]))
        knees = [_knee(part) for part in groups(means, "method").values()]
        tables += [Table(f"Knee: {title}", KNEES, knees), Table(f"Sweep: {title}", SWEEP, means)]
    return tables


def mean_over_seeds(rows: list[Row]) -> Row:
    """Return means over seeds, shares in percent, with standard deviations."""

    def over(name: str) -> list[float]:
        return [float(row[name]) for row in rows]

    percent = {
        name: 100 * statistics.mean(over(name))
        for name in ("accuracy", "float_accuracy", "agreement")
    }
    return {
        **{name: rows[0][name] for name in ("method", "source", "iterations") if name in rows[0]},
        **percent,
        "seeds": len(rows),
        "seconds": statistics.mean(over("invert_seconds")),
        "accuracy_error": 100 * statistics.stdev(over("accuracy")) if len(rows) > 1 else None,
        "kl": statistics.mean(over("kl")),
        "kl_error": statistics.stdev(over("kl")) if len(rows) > 1 else None,
    }


def _knee(means: list[Row]) -> Row:
    """Return the best result of a method, and the least time that is about as good."""
    best = max(means, key=lambda row: float(row["accuracy"]))
    least = min(means, key=lambda row: float(row["kl"]))
    good = [row for row in means if row["accuracy"] >= best["accuracy"] - POINTS - 1e-9]
    close = [row for row in means if row["kl"] <= (1 + SHARE) * least["kl"]]
    knee, kl_knee = (min(some, key=lambda row: float(row["seconds"])) for some in (good, close))
    return {
        "method": best["method"],
        "best_accuracy": best["accuracy"],
        "best_iterations": best["iterations"],
        "knee_iterations": knee["iterations"],
        "knee_seconds": knee["seconds"],
        "best_kl": least["kl"],
        "kl_iterations": kl_knee["iterations"],
        "kl_seconds": kl_knee["seconds"],
        "verdict": "; ".join(
            f"{name}: {_against_chance(means, column)}"
            for name, column in (("top-1", "accuracy"), ("KL", "kl"))
        ),
    }


def _against_chance(means: list[Row], column: str) -> str:
    """Say whether iterations matter more than seeds: the range of a method's means beside the
    mean standard deviation over seeds."""
    spreads = [row[f"{column}_error"] for row in means if row[f"{column}_error"] is not None]
    if len(means) < 2 or not spreads:
        return "needs several iterations and seeds"
    values = [float(row[column]) for row in means]
    extent, spread = max(values) - min(values), statistics.mean(spreads)
    verdict = "below, so chance" if extent <= spread else "above"
    return f"{extent:.2g} to {spread:.2g}, {verdict}"


def quality_plots(rows: list[Row]) -> list[Plot]:
    """Return plots of accuracy and KL over inversion time, with a curve for each method."""
    plots: list[Plot] = []
    for values, same in groups(rows, *QUALITY).items():
        about = dict(zip(QUALITY, values, strict=True))
        model, bits = about["model"], about["bits"]
        suffix = "" if about["reduce_range"] else "-full-range"
        means = [mean_over_seeds(part) for part in groups(same, "method", "iterations").values()]
        means.sort(key=lambda row: float(row["seconds"]))
        for column, label in (("accuracy", "top-1, %"), ("kl", "KL from the float prediction")):
            curves = [
                Curve(
                    str(method),
                    [float(row["seconds"]) for row in part],
                    [float(row[column]) for row in part],
                    [float(row[f"{column}_error"] or 0) for row in part],
                )
                for (method,), part in groups(means, "method").items()
            ]
            plots.append(
                Plot(
                    f"quality-{column}-{model}-w{bits}a8{suffix}",
                    f"Quality over cost, {model}, {width(about)}",
                    "seconds to invert",
                    label,
                    curves,
                    log_x=True,
                )
            )
    return plots
