"""The experiment ``inversion-speed`` and its tables."""
