"""``python -m align``: the same as the command ``align``."""

from align.cli import main

if __name__ == "__main__":
    main()
