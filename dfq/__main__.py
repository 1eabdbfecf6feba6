"""``dfq`` and ``python -m dfq``: the command line."""

from dfq.cli.interrupts import end_at_once


def main() -> None:
    """Run the command line, whose modules take a while to load."""
    end_at_once()
    from dfq.cli.app import app

    app()


if __name__ == "__main__":
    main()
