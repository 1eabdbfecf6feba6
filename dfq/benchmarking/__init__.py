"""Benchmark of a checkpoint against other runtimes."""
