"""Print the documentation of all settings: `python -m dmtjepa.config --markdown > docs/settings.md`."""

from __future__ import annotations

import argparse

from dmtjepa.config.documentation import make_markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", required=True, help="as the page docs/settings.md")
    parser.parse_args()
    print(make_markdown(), end="")


if __name__ == "__main__":
    main()
