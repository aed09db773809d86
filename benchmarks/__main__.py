"""`python -m benchmarks COMMAND`: sides, counts, precision, scaling or report; `COMMAND --help` says more."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {name: name for name in ("sides", "counts", "precision", "scaling")} | {"report": "page"}


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command not in COMMANDS:
        print(__doc__)
        sys.exit(command not in ("-h", "--help"))
    importlib.import_module(f"benchmarks.{COMMANDS[command]}").main(arguments)


if __name__ == "__main__":
    main()
