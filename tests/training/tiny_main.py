"""main.py with the tiny network."""

import sys

import tiny_architecture  # noqa: F401

import main

if __name__ == "__main__":
    sys.exit(main.main())
