"""`python -m dmtjepa.interop show|export|verify` is `dmtjepa show|export|verify`."""

import sys

from dmtjepa.cli.weights import main

if __name__ == "__main__":
    sys.exit(main())
