"""The experiment ``inversion-quality`` and its tables."""
