"""`python -m dmtjepa` is the command `dmtjepa`, where that is not on the path."""

import sys

from dmtjepa.cli import main

if __name__ == "__main__":
    sys.exit(main())
