"""``dfq`` and ``python -m dfq``: the command line."""

import sys


def main() -> None:
    """Run the command line, whose modules take a while to load."""
    try:
        from dfq.cli import app
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
