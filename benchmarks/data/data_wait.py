"""The share of a run's time in which the device waits for data: the trainer's own loop, on photographs.

    python -m benchmarks.data.data_wait FOLDER [--workload vit_large:256] [--loader dali] [--workers N] [--out RESULTS]

The photographs of FOLDER are linked, again and again, into a data set of --steps batches. One process trains on them as
main.py would with the settings of the official run, but saves nothing. The share is the one that the run reports
(TensorBoard, `train/data_wait`), without the first --warmup steps, which compile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from unittest import mock

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.data.loader import link_images
from benchmarks.machine import default_device
from benchmarks.tables import number, save, text_table
from benchmarks.workloads import Workload, add_workload, chosen_workload
from dmtjepa.training.launch import launch
from dmtjepa.training.saving import Saver

LOG_EVERY = 10
COLUMNS = {
    "workload": lambda row: row["workload"],
    "loader": lambda row: row["loader"],
    "workers": number("workers", "{}"),
    "images/s": number("trained_images_per_s", "{:.0f}"),
    "data wait": number("data_wait_share", "{:.1%}"),
}


def measure(workload: Workload, folder: Path, options: argparse.Namespace) -> dict:
    """Train on a folder of photographs; what the run reported after the warm-up."""
    with tempfile.TemporaryDirectory(prefix="bench-data-wait-") as temporary:
        images, run = Path(temporary, "images"), Path(temporary, "run")
        link_images(folder, options.steps * workload.batch_size, images)
        config = workload.config(
            f"data.root_path={temporary}",
            f"data.image_folder={images.name}",
            f"data.loader={options.loader}",
            f"data.num_workers={options.workers}",
            f"logging.folder={run}",
            "meta.load_checkpoint=false",
            "optimization.epochs=1",
            "optimization.warmup=0",
            f"runtime.log_every={LOG_EVERY}",
        )
        with mock.patch.object(Saver, "save"):
            launch(config, [options.device])
        board = EventAccumulator(str(run / "tensorboard")).Reload()
        waits, rates = (
            [event.value for event in board.Scalars(name) if event.step >= options.warmup]
            for name in ("train/data_wait", "train/images_per_second")
        )
    return {
        **workload.description,
        "loader": options.loader,
        "workers": options.workers,
        "steps": options.steps - options.warmup,
        "data_wait_share": statistics.fmean(waits),  # blocks of as many steps each
        "trained_images_per_s": statistics.harmonic_mean(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs")
    add_workload(parser, "vit_large:256")
    parser.add_argument("--loader", choices=("dali", "pil"), default="dali")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads or processes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=40, help="steps of these that do not count")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the result")
    options = parser.parse_args()
    if options.steps % LOG_EVERY or options.warmup % LOG_EVERY or options.warmup >= options.steps:
        parser.error(f"--steps and a smaller --warmup are multiples of {LOG_EVERY}")

    row = measure(chosen_workload(options), options.folder, options)
    print(text_table(COLUMNS, [row], num_names=2))
    save(options.out, "data-wait", options.device.partition(":")[0], [row])


if __name__ == "__main__":
    main()
