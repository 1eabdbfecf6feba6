"""Sparse-image datasets, the cache, augmentation, and the user's images."""
