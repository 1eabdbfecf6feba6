"""The experiment ``rebirth`` and its tables."""
