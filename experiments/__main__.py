"""Compare variants of the method over seeds.

    python -m experiments run experiments/tables/scenes_queries.yaml --data IMAGES --out FOLDER
    python -m experiments table FOLDER
    python -m experiments plot FOLDER
    python -m experiments publish FOLDER --out FILE

`run` computes what has no result yet on one core, and can be stopped or killed at any moment: give the same command
again. Start it on as many cores as there are; each process takes other runs. `publish` writes the results as one file
without folders of this machine, which `table` and `plot` read like a folder.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dmtjepa.cli.exit_status import run_command
from experiments.publication import publish_results
from experiments.runner import compute
from experiments.summary import format_table, read_results, save_curves, save_plot
from experiments.table import TableError, read_table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="compute the runs of a table")
    run.add_argument("table", type=Path, help="a file of experiments/tables/")
    run.add_argument("--data", type=Path, required=True, help="labelled images: a folder with train/ and val/ or test/")
    run.add_argument("--out", type=Path, required=True, help="folder of the runs and their results")
    run.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: cpu)")
    table = commands.add_parser("table", help="print a table of results: mean and standard deviation over seeds")
    table.add_argument("source", type=Path, help="--out of `run` or of `publish`")
    plot = commands.add_parser("plot", help="draw results.png and, of what was measured during training, curves.png")
    plot.add_argument(
        "source", type=Path, help="--out of `run`, or of `publish`, whose plots have its name before theirs"
    )
    publish = commands.add_parser("publish", help="write the results as one file, to be kept")
    publish.add_argument("folder", type=Path, help="--out of `run`")
    publish.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .json file")
    publish.add_argument(
        "--made-by", default="python -m experiments run", metavar="COMMAND", help="the command that made the results"
    )
    publish.add_argument("--hardware", help="that they were made on; default: what the runs have recorded")
    publish.add_argument("--note", default="", help="what a reader must know of them")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse_arguments(arguments)
    return run_command(lambda: work(options), interrupted="stopped; give the same command again to continue")


def work(options: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit status."""
    if options.command == "run":
        if not options.data.is_dir():
            raise TableError(f"--data: {options.data} is no folder; nothing was started")
        failed = compute(read_table(options.table), options.data, options.out, options.device)
        if failed:
            print(f"{len(failed)} runs failed and are tried again next time: {', '.join(failed)}", file=sys.stderr)
        return int(bool(failed))
    if options.command == "publish":
        publish_results(
            options.folder, options.out, command=options.made_by, hardware=options.hardware, note=options.note
        )
        print(f"written: {options.out}")
        return 0
    results = read_results(options.source)
    if options.command == "table":
        print(format_table(results))
        return 0
    in_file = options.source.is_file()
    folder, prefix = (options.source.parent, f"{options.source.stem}-") if in_file else (options.source, "")
    plot, curves = folder / f"{prefix}results.png", folder / f"{prefix}curves.png"
    save_plot(results, plot)
    print(f"written: {plot}")
    if save_curves(results, curves):
        print(f"written: {curves}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
