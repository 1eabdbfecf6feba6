"""One module an experiment; :mod:`calibration_bench.core.registry` lists them."""
