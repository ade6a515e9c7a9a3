"""Masks of a batch: time of `MaskSampler`, of the plain loops it is tested against, and of the official collator.

    python -m benchmarks.data.masks [--official CHECKOUT] [--json FILE]

CHECKOUT is a clone of the official DMT-JEPA (or I-JEPA) code. Its collator makes only the indices of context and
targets; `MaskSampler` also makes target_unique, target_slot and neighborhood. No time is printed unless the samplers
agree in distribution.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from benchmarks.machine import environment
from benchmarks.official import add_official, open_checkout
from benchmarks.tables import number, text_table
from dmtjepa.config import MaskSettings
from dmtjepa.masks import MaskSampler
from dmtjepa.reference.masks import sample_masks_reference

CASES = (((16, 16), 128), ((14, 14), 256))  # grid size, images


Sample = Callable[[int], tuple[int, int]]  # of a step, to the patches of a context and of a target block


def fast_sampler(settings: MaskSettings, grid_size: tuple[int, int], batch_size: int) -> Sample:
    sampler = MaskSampler(settings, grid_size, batch_size)

    def sample(step: int) -> tuple[int, int]:
        masks = sampler.sample(step)
        return masks.context_index.shape[1], masks.target_index.shape[2]

    return sample


def plain_sampler(settings: MaskSettings, grid_size: tuple[int, int], batch_size: int) -> Sample:
    rng = random.Random(0)

    def sample(step: int) -> tuple[int, int]:
        contexts, targets, _, _ = sample_masks_reference(settings, grid_size, batch_size, rng)
        return len(contexts[0]), len(targets[0][0])

    return sample


def official_sampler(settings: MaskSettings, grid_size: tuple[int, int], batch_size: int) -> Sample:
    """The official collator, on a batch of empty images. Its checkout must be on sys.path."""
    from src.masks.multiblock import MaskCollator

    torch.manual_seed(0)
    collator = MaskCollator(
        input_size=tuple(side * settings.patch_size for side in grid_size),
        patch_size=settings.patch_size,
        enc_mask_scale=settings.enc_mask_scale,
        pred_mask_scale=settings.pred_mask_scale,
        aspect_ratio=settings.aspect_ratio,
        nenc=settings.num_enc_masks,
        npred=settings.num_pred_masks,
        min_keep=settings.min_keep,
        allow_overlap=settings.allow_overlap,
    )
    images = [torch.zeros(1) for _ in range(batch_size)]

    def sample(step: int) -> tuple[int, int]:
        _, context, target = collator(images)
        return context[0].shape[1], target[0].shape[1]

    return sample


def measure(samplers: dict[str, Sample], num_batches: int) -> dict[str, dict]:
    """Sizes and milliseconds of num_batches batches of each; taken in turns, so that all meet the same load."""
    result = {name: {"sizes": [], "ms": []} for name in samplers}
    for step in range(num_batches):
        for name, sample in samplers.items():
            start = time.perf_counter()
            result[name]["sizes"].append(sample(step))
            result[name]["ms"].append(1e3 * (time.perf_counter() - start))
    return result


def check_agreement(first: list[tuple[int, int]], second: list[tuple[int, int]], what: str) -> None:
    """Stop where context lengths, or target sizes, cannot come from one distribution."""
    for name, a, b in zip(("context lengths", "target sizes"), np.transpose(first), np.transpose(second), strict=True):
        pvalue = stats.ks_2samp(a, b).pvalue
        if pvalue < 1e-3:
            sys.exit(f"{what}: {name} differ in distribution (p = {pvalue:.1e}); nothing is timed")


COLUMNS = {
    "grid and batch": lambda row: row["case"],
    "sampler": lambda row: row["sampler"],
    "ms": number("ms", "{:.2f}"),
    "ratio": number("ratio"),
    "mean C": number("C"),
    "mean T": number("T"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_official(parser)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--batches", type=int, default=200, help="batches of each measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader's worker
    if args.official:
        open_checkout(args.official)

    rows = []
    for grid_size, batch_size in CASES:
        case = f"{grid_size[0]}x{grid_size[1]}, {batch_size} images"
        samplers, same_as = {}, {}
        for name in ("released", "corrected"):
            settings = MaskSettings(sampler=name)
            samplers[name] = fast_sampler(settings, grid_size, batch_size)
            samplers[f"{name}, plain loops"] = plain_sampler(settings, grid_size, batch_size)
            same_as[f"{name}, plain loops"] = name
        if args.official:
            samplers["official collator"] = official_sampler(MaskSettings(), grid_size, batch_size)
            same_as["official collator"] = "released"
        result = measure(samplers, args.batches)
        for name, other in same_as.items():
            check_agreement(result[name]["sizes"], result[other]["sizes"], f"{case}: {name} and {other}")
        baseline = "official collator" if args.official else "released, plain loops"
        slow = statistics.median(result[baseline]["ms"])
        for name, found in result.items():
            ms = statistics.median(found["ms"])
            context, target = np.mean(found["sizes"], axis=0).round(1).tolist()
            rows.append({"case": case, "sampler": name, "ms": ms, "ratio": slow / ms, "C": context, "T": target})

    described = environment("cpu")
    print(", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"medians of {args.batches} batches; ratio: time of the {baseline} over this time\n")
    print(text_table(COLUMNS, rows, num_names=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": described, "baseline": baseline, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
