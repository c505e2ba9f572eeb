"""`python -m octavo` is the command `octavo`."""

from __future__ import annotations

import sys

from octavo.cli import main

# Guarded: the processes that `octavo bench` starts import this file too.
if __name__ == "__main__":
    sys.exit(main())
