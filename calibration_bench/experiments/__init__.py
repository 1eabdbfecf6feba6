"""One module an experiment; :mod:`calibration_bench.registry` lists them."""
