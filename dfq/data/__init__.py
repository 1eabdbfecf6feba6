"""Images on disk: sparse-image datasets, the cache, and images of the user."""
