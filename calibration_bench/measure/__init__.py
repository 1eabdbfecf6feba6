"""What experiments measure, and of what."""
