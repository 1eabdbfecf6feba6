"""The framework of the bench: registry, stored rows, runner and report."""
