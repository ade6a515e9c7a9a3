"""`dmtjepa evaluate RUN`: measure teacher and student of a run, and write RUN/report/, with report.html to look at."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from dmtjepa.arguments import describe_command
from dmtjepa.cli.exit_status import run_command
from dmtjepa.errors import UserError


def main(arguments: Sequence[str] | None = None, *, prog: str = "python -m dmtjepa.evaluation") -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        **describe_command(
            "Measure teacher and student of a run, and write tables and figures into RUN/report/.",
            "dmtjepa evaluate runs/mine",
            "dmtjepa evaluate runs/mine --checkpoint runs/mine/jepa-best.pth.tar",
            "dmtjepa evaluate facebook/ijepa_vith14_1k --data photos",
        ),
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or weights: see --data")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="IMAGES",
        help="images: a folder, a list, tar shards or hf:NAME (default: those of the run; weights alone have none)",
    )
    parser.add_argument("--train", type=Path, metavar="IMAGES", help="labelled images to compare with; needs --val")
    parser.add_argument("--val", type=Path, metavar="IMAGES", help="labelled images to classify; needs --train")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="file to measure (default: the run's latest)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the report (default: RUN/report)")
    parser.add_argument("--max-images", type=int, metavar="N", help="upper limit for the images of each split")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out what takes long: low-shot and attentive probes, and the probe of the last four layers",
    )
    parser.add_argument(
        "--num-workers", type=int, metavar="N", default=0, help="processes that load images (%(default)s)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cuda or cpu (default: cuda if there is a GPU)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    return run_command(lambda: measure(options), errors=(UserError, OSError))


def measure(options: argparse.Namespace) -> int:
    """Do what the options ask for; returns the exit status."""
    import torch

    from dmtjepa.devices import check_device
    from dmtjepa.evaluation.formatting import format_table, format_verdict
    from dmtjepa.evaluation.option_names import COMMAND_LINE
    from dmtjepa.evaluation.report import evaluate
    from dmtjepa.evaluation.splits import find_splits
    from dmtjepa.evaluation.subject import find_subject

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    subject = find_subject(
        options.run,
        has_images=options.data is not None or options.train is not None,
        checkpoint=options.checkpoint,
        out=options.out,
        options=COMMAND_LINE,
    )
    splits = find_splits(
        subject.config.data,
        data=options.data,
        train=options.train,
        validation=options.val,
        max_images=options.max_images,
        options=COMMAND_LINE,
    )
    print(
        f"measuring {subject.checkpoint} on {device}: {len(splits.train)} training and "
        f"{len(splits.validation)} validation images of {splits.description}",
        flush=True,
    )
    report = evaluate(
        subject,
        splits,
        device=device,
        num_workers=options.num_workers,
        quick=options.quick,
        options=COMMAND_LINE,
    )
    table = format_table(report)
    print(f"\n{table}\n" if table else "")
    print("\n".join(format_verdict(report)))
    out = subject.out
    print(f"\nwritten: {out}/report.html, {', '.join(Path(f).name for f in report.files[1:])}")
    print("next:")
    print(f"  open {out}/report.html in a browser")
    print(f"  dmtjepa export {options.run} --format hf --out {out.parent}/hf   # or timm, official")
    print(f"  dmtjepa evaluate {options.run} --data FOLDER   # measure on other labelled images")
    return 0
