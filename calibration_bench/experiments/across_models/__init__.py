"""The experiment ``across-models`` and its tables."""
