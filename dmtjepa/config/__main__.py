"""`python -m dmtjepa.config` is `dmtjepa settings`."""

import sys

from dmtjepa.cli.settings import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m dmtjepa.config"))
