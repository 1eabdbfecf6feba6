"""The command line: parses, calls the public functions and prints."""
