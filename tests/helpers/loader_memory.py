"""The memory of a loader while it reads 2000 batches, as a program: other tests in its process would show up in it.

    python -m tests.helpers.loader_memory FOLDER LOADER

prints a JSON list: the bytes after every 500 batches.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from pathlib import Path

from dmtjepa.config import DataSettings
from dmtjepa.data import build_loader


def written_memory() -> int:
    """Bytes that this process and its children have written and share with nobody.

    Clean pages are left out: those of a library become private when another program that uses it ends.
    """
    own = Path("/proc/self")
    children = (own / "task" / own.resolve().name / "children").read_text().split()
    total = 0
    for process in (own, *(Path("/proc", pid) for pid in children)):
        for line in (process / "smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty"):
                total += 1024 * int(line.split()[1])
    return total


def main(folder: str, loader_name: str) -> None:
    settings = DataSettings(root_path=folder, batch_size=2, crop_size=32, num_workers=2, loader=loader_name)
    gc.collect()
    gc.freeze()  # else a collection in a worker writes to every page that it shares with this process
    loader = build_loader(settings, seed=0)
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in range(10_000))
    measured = []
    for step, _ in enumerate(batches, 1):
        if step % 500 == 0:
            gc.collect()
            measured.append(written_memory())
        if step == 2000:
            break
    loader.close()
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
