"""`invariclip` and `python -m invariclip` are the command line; Ctrl-C while modules are imported is one line too."""

from __future__ import annotations

import sys


def run() -> None:
    """Runs the command line."""
    try:
        from invariclip.cli.main import main

        main()
    except KeyboardInterrupt:
        sys.stderr.write("invariclip: interrupted; run the same command again\n")
        sys.exit(130)


if __name__ == "__main__":
    run()
