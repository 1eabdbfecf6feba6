"""Stored rows of the experiments as tables; pure functions of JSON values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from calibration_bench.registry import Row, Table

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


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of some columns, in the order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def speed_tables(rows: list[Row]) -> list[Table]:
    """A table for each model and setting of a trajectory, and the checks."""
    races = groups(
        (row for row in rows if row["kind"] == "speed"), "model", "iterations", "threads", "device"
    )
    found = [
        Table(
            f"{model}, T = {iterations}, {threads} threads, {device}",
            SPEED,
            [_compared(row, same) for row in same],
        )
        for (model, iterations, threads, device), same in races.items()
    ]
    checks = [row for row in rows if row["kind"] == "check"]
    return [*found, Table("Extrapolation against whole runs", CHECKS, checks)]


def _compared(row: Row, others: list[Row]) -> Row:
    """A row with how many times faster it is than others' rows."""

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


def floor_tables(rows: list[Row]) -> list[Table]:
    """A table for each model."""
    found = groups(rows, "model", "batch", "precision", "threads")
    return [
        Table(
            f"{model}: an iteration of {batch} trajectories, {precision}, {threads} threads",
            FLOOR,
            [_floor(row) for row in same],
        )
        for (model, batch, precision, threads), same in found.items()
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
