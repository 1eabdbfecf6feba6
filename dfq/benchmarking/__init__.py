"""Speed of a checkpoint beside the same model on other runtimes."""
