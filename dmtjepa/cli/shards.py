"""`dmtjepa shards SOURCE OUT`: pack images into tar shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dmtjepa.arguments import describe_command
from dmtjepa.cli.exit_status import run_command
from dmtjepa.errors import UserError


def main(arguments: Sequence[str] | None = None, *, prog: str = "dmtjepa shards") -> int:
    """Run the command line; returns the exit status, 1 if images are left out."""
    parser = argparse.ArgumentParser(
        prog=prog,
        **describe_command(
            "Pack images into tar shards. An interrupted call continues when it is started again.",
            "dmtjepa shards photos photos-shards",
        ),
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of images, file list (.txt, .tsv, .lst), or hf:NAME")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the shards")
    parser.add_argument("--shard-size", type=int, metavar="N", default=5000, help="images per shard (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", default=8, help="shards written in parallel (%(default)s)")
    options = parser.parse_args(arguments)
    if options.shard_size < 1 or options.threads < 1:
        parser.error("--shard-size and --threads must be at least 1")
    if options.out.resolve() == Path(options.source).resolve():
        parser.error("write to another folder: a folder with both images and shards cannot be read")
    return run_command(lambda: pack(options), errors=(UserError, OSError))


def pack(options: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit status."""
    from dmtjepa.data import open_images
    from dmtjepa.data.make_shards import make_shards

    source = open_images(options.source)
    unreadable = make_shards(source, options.out, options.shard_size, options.threads)
    num_packed = len(open_images(options.out))
    for name, reason in unreadable:
        print(f"left out {name}: {reason}", file=sys.stderr)
    num_shards = len(list(options.out.glob("shard-*.tar")))
    num_missing = len(source) - num_packed  # including those that an earlier, interrupted call left out
    missing = f" ({num_missing} could not be read and are left out)" if num_missing else ""
    print(f"{num_packed} images in {num_shards} shard{'s' * (num_shards != 1)} in {options.out}{missing}")
    print(f"train on them with: data.root_path={options.out.absolute()}")
    return 1 if num_missing else 0
