"""What the public functions return, with its intervals, gates and tables."""
