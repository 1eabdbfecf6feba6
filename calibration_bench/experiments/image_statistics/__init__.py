"""The experiment ``image-statistics`` and its tables."""
