"""`python -m dmtjepa.evaluation` is `dmtjepa evaluate`."""

import sys

from dmtjepa.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
