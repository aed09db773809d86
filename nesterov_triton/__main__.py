"""``python -m nesterov_triton``: the same command as ``nesterov-triton``."""

import sys

from nesterov_triton.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
