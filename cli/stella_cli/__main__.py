"""The command `stella`, also run as `python -m stella_cli`."""

from __future__ import annotations

import sys

from stella_cli.commands import run


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
