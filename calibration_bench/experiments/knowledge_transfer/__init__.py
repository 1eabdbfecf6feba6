"""The experiment ``knowledge-transfer`` and its tables."""
