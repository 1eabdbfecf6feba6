"""``dfq`` and ``python -m dfq``: the command line."""

from dfq.cli.interrupts import end_at_once, ignore
from dfq.cli.streams import settle


def main() -> None:
    """Run the command line, whose modules take a while to load."""
    settle()
    end_at_once()
    from dfq.cli.app import app

    try:
        app()
    finally:
        ignore()


if __name__ == "__main__":
    main()
