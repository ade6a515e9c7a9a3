"""main.py with the tiny network."""

import sys

import main
import tests.helpers.tiny_architecture  # noqa: F401

if __name__ == "__main__":
    sys.exit(main.main())
