"""Images per second of the loaders, from a folder and from tar shards, at equal cores.

    python -m benchmarks.data.loader FOLDER [--official CHECKOUT] [--workers 2] [--device cuda] [--json FILE]

FOLDER holds photographs, such as the ImageNet sample; they are linked, again and again, into a data set of --images.
CHECKOUT is a clone of the official DMT-JEPA (or I-JEPA) code. All loaders run in turns with the settings of the
official ViT-L run. Nothing is timed unless DALI's pixels agree with the loader pil's.

Beside images/s stands images/s per core: images over the processor seconds that all threads and processes of the
loader used, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import environment
from benchmarks.official import add_official, open_checkout
from benchmarks.predictions import PREDICTIONS
from dmtjepa.config import DataSettings
from dmtjepa.data import FolderSource, Loader, build_loader
from dmtjepa.data.make_shards import make_shards

# Images/s that one GPU trains with, predicted.
NEEDS = {
    gpu: {
        name: round(int(prediction.workload.partition(":")[2]) / prediction.seconds[gpu])
        for name, prediction in PREDICTIONS.items()
    }
    for gpu in ("A100", "H100")
}


def link_images(folder: Path, count: int, out: Path) -> None:
    """A data set of `count` links to the images of a folder, laid out as ImageNet: out/train/<class>/*.JPEG."""
    source = FolderSource(folder)
    for number in range(count):
        target = Path(source.name(number % len(source))).resolve()
        link = out / "train" / f"n{number % 100:08d}" / f"{number:07d}.JPEG"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)


def processor_seconds() -> float:
    """Used so far by this process and its children that live."""
    ticks = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in ("self", *children):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def stream(loader: Loader) -> Iterator[Tensor]:
    """Batch after batch, epoch after epoch."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def open_ours(path: Path, kind: str, args: argparse.Namespace) -> tuple[Iterator[Tensor], Callable[[], None]]:
    settings = DataSettings(
        root_path=str(path),
        batch_size=args.batch_size,
        num_workers=args.workers,
        loader=kind,
        pin_mem=args.device != "cpu",
    )
    loader = build_loader(settings, seed=0, device=args.device)
    return stream(loader), loader.close


def open_official(path: Path, args: argparse.Namespace) -> tuple[Iterator[Tensor], Callable[[], None]]:
    """The official loader with its transform; its checkout must be on sys.path."""
    from src.datasets.imagenet1k import make_imagenet1k
    from src.transforms import make_transforms

    transform = make_transforms(crop_size=224, crop_scale=(0.3, 1.0), color_jitter=0.0)
    made = make_imagenet1k(
        transform=transform,
        batch_size=args.batch_size,
        pin_mem=args.device != "cpu",
        num_workers=args.workers,
        root_path=str(path),
        image_folder="",
        training=True,
        drop_last=True,
    )
    loader = next(part for part in made if isinstance(part, torch.utils.data.DataLoader))
    batches = iter(loader)
    return batches, batches._shutdown_workers


def measure(batches: Iterator[Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Rates over args.batches batches, after the queues ran dry once."""
    for _ in range(2 * args.workers + 4):
        next(batches)
    start, used = time.perf_counter(), processor_seconds()
    for _ in range(args.batches):
        next(batches)
    if args.device != "cpu":
        torch.cuda.synchronize()
    count = args.batches * args.batch_size
    seconds, used = time.perf_counter() - start, processor_seconds() - used
    return {"images_per_second": count / seconds, "images_per_core_second": count / used}


def check_pixels(path: Path, args: argparse.Namespace) -> None:
    """Stop where DALI's first batch is not that of the loader pil."""
    epochs = []
    for kind in ("pil", "dali"):
        batches, close = open_ours(path, kind, args)
        epochs.append(next(batches).cpu().int())
        close()
    apart = (epochs[0] - epochs[1]).abs().float().mean().item()
    if apart > 1.5:
        sys.exit(f"DALI's pixels differ from PIL's by {apart:.2f} grey levels; nothing is timed")


def describe(args: argparse.Namespace) -> dict[str, str | int | bool | None]:
    from nvidia.dali import __version__ as dali  # its package's name holds the version of CUDA

    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "pillow", "numpy")}
    versions["dali"] = dali
    return {
        **environment("cpu" if args.device == "cpu" else "cuda"),
        "device": args.device,
        "workers": args.workers,
        "batch_size": args.batch_size,
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs")
    add_official(parser)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes or threads")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=4000, help="size of the data set")
    parser.add_argument("--batches", type=int, default=16, help="batches of each measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each loader; the median counts")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda to decode there with DALI")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args()
    if args.official:
        open_checkout(args.official)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        folder, shards = Path(temporary, "folder"), Path(temporary, "shards")
        link_images(args.folder, args.images, folder)
        make_shards(FolderSource(folder), shards, 1000)
        check_pixels(folder, args)
        cases: dict[str, Callable] = {
            f"{kind}, {form}": lambda kind=kind, path=path: open_ours(path, kind, args)
            for kind in ("pil", "dali")
            for form, path in (("folder", folder), ("tar", shards))
        }
        if args.official:
            cases["official, folder"] = lambda: open_official(folder, args)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, open_case in cases.items():
                batches, close = open_case()
                found[name].append(measure((b if torch.is_tensor(b) else b[0] for b in batches), args))
                close()

    rates = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in found.items()
    }
    base = rates["pil, folder"]
    described = describe(args)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print(f"\n{'loader':<22}{'images/s':>10}{'per core':>10}{'of pil':>16}{'per core':>10}")
    for name, rate in rates.items():
        total, core = rate["images_per_second"], rate["images_per_core_second"]
        print(
            f"{name:<22}{total:>10.0f}{core:>10.0f}{total / base['images_per_second']:>15.2f}x"
            f"{core / base['images_per_core_second']:>9.2f}x"
        )
    print(f"\n{'trainer needs (predicted)':<28}{'images/s':>10}" + "".join(f"{name:>22}" for name in rates))
    for gpu, models in NEEDS.items():
        for model, need in models.items():
            cores = "".join(f"{need / rate['images_per_core_second']:>16.1f} cores" for rate in rates.values())
            print(f"{gpu + ', ' + model:<28}{need:>10}{cores}")
    if args.json:
        rows = [{"loader": name, **rate} for name, rate in rates.items()]
        args.json.write_text(json.dumps({**described, "needs": NEEDS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
