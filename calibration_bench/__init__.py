"""Benchmarks of inversion speed and of calibration sets, for readers who want proof.

They call dfq's public functions, store every measurement with the machine it was made on, and
render tables from the stored rows alone.
"""
