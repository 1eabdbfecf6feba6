"""The experiment ``evolution`` and its tables."""
