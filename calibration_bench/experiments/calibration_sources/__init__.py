"""The experiment ``calibration-sources`` and its tables."""
