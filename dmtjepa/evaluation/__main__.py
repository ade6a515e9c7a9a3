"""`python -m dmtjepa.evaluation RUN`: measure the teacher of a run, and write RUN/report/."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dmtjepa.errors import UserError
from dmtjepa.evaluation.formatting import format_table, format_verdict
from dmtjepa.evaluation.report import evaluate
from dmtjepa.evaluation.splits import find_splits
from dmtjepa.output import protect_output
from dmtjepa.run_folder import open_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    protect_output()
    parser = argparse.ArgumentParser(prog="python -m dmtjepa.evaluation", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder (logging.folder of its settings)")
    parser.add_argument("--data", type=Path, help="images: a folder, a list or tar shards (default: those of the run)")
    parser.add_argument("--train", type=Path, help="labelled images to compare with; needs --val")
    parser.add_argument("--val", type=Path, help="labelled images to classify; needs --train")
    parser.add_argument("--checkpoint", type=Path, help="file to measure (default: the run's latest)")
    parser.add_argument("--out", type=Path, help="folder of the report (default: RUN/report)")
    parser.add_argument("--max-images", type=int, help="upper limit for the images of each split")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long: low-shot, attentive probes")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is a GPU)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        print(f"error: --device {device}: torch finds no CUDA device; use --device cpu", file=sys.stderr)
        return 1
    try:
        run, config = open_run(options.run)
        checkpoint, out = options.checkpoint or run.latest_export, options.out or run.report
        splits = find_splits(
            config.data, data=options.data, train=options.train, validation=options.val, max_images=options.max_images
        )
        print(
            f"measuring {checkpoint} on {device}: {len(splits.train)} training and "
            f"{len(splits.validation)} validation images of {splits.description}",
            flush=True,
        )
        report = evaluate(
            run,
            config,
            checkpoint,
            splits,
            out,
            device=device,
            num_workers=options.num_workers,
            quick=options.quick,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = format_table(report)
    print(f"\n{table}\n" if table else "")
    print("\n".join(format_verdict(report)))
    print(f"\nwritten: {out}/report.md, report.json, {', '.join(Path(f).name for f in report.files[2:])}")
    print("next:")
    print(f"  look at {out}/report.png")
    print(f"  python -m dmtjepa.interop export {options.run} --format hf --out {options.run}/hf   # or timm, official")
    print("  python -m dmtjepa.evaluation RUN --data FOLDER                # measure on other labelled images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
