"""``python -m align``: the same as the command ``align``."""

import os
import sys

from align.signals import LAUNCHER, end_with

if __name__ == "__main__" and (launcher := os.environ.pop(LAUNCHER, None)) is not None:
    end_with(int(launcher))  # before anything that takes time is imported

from align.cli import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as stopped:
        if "WORLD_SIZE" not in os.environ:
            raise
        # One of several processes. Threads of the group that it has left may still run, and would abort a program that
        # takes itself apart.
        sys.stdout.flush()
        sys.stderr.flush()
        if stopped.code is None:
            os._exit(0)
        os._exit(stopped.code if isinstance(stopped.code, int) else 1)
