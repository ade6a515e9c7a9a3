"""What messages call the options of an evaluation: keywords in Python, options on the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptionNames:
    """The names of options where an evaluation was asked for. The defaults are the keywords of `dmtjepa.evaluate`."""

    data: str = "data"
    train: str = "train"
    validation: str = "validation"
    checkpoint: str = "checkpoint"
    max_images: str = "max_images"
    quick: str = "quick"
    num_workers: str = "num_workers"
    out: str = "out"


KEYWORDS = OptionNames()
COMMAND_LINE = OptionNames(
    "--data", "--train", "--val", "--checkpoint", "--max-images", "--quick", "--num-workers", "--out"
)
