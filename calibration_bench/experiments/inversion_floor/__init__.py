"""The experiment ``inversion-floor`` and its tables."""
