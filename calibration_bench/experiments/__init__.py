"""Experiments, one package each, listed in :mod:`calibration_bench.core.registry`."""
