"""A student trained on a teacher's inverted images."""
