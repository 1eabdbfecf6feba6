"""``python -m dfq``: the command line."""

from dfq.cli import main

if __name__ == "__main__":
    main()
