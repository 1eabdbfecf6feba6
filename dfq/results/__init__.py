"""Results of the public functions, with intervals, gates and tables."""
