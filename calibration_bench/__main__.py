"""``python -m calibration_bench``."""

from calibration_bench.cli import main

if __name__ == "__main__":
    main()
