"""What the dtype of the residual stream changes: the output of an encoder, against float32.

Drawn weights and images through the encoders of the official sizes: in bfloat16 with a residual stream of bfloat16
(`runtime.residual: bfloat16`) or of float32, and in float32 under PyTorch's autocast, as the official code computes. No
time is measured, so a CPU is enough. The program also prints the memory of a step on one GPU by estimate.

    python -m benchmarks.step.residual [--workloads vit_base:2 vit_large:2 vit_huge:2] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import GIB, default_device
from benchmarks.operators.cases import relative_error
from benchmarks.tables import number, save, text_table
from benchmarks.workloads import OFFICIAL_WORKLOADS, Workload, add_workloads, chosen_workloads, parse_workload
from dmtjepa.models import ARCHITECTURES, VisionTransformer
from dmtjepa.training.estimate import measure_masks, memory_bytes

SMALL_BATCHES = ("vit_base:2", "vit_large:2", "vit_huge:2")


@torch.no_grad()
def measure(workload: Workload, device: str) -> list[dict]:
    """One row per way of computing."""
    torch.manual_seed(0)
    encoder = VisionTransformer(workload.image_size, workload.patch_size, **ARCHITECTURES[workload.model]).to(device)
    images = workload.images(device)
    expected = encoder(images)

    def in_bfloat16(residual_dtype: torch.dtype | None) -> Tensor:
        other: nn.Module = copy.deepcopy(encoder).bfloat16()
        other.residual_dtype = residual_dtype
        return other(images)

    def under_autocast() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return encoder(images)

    outputs = {
        "bfloat16": in_bfloat16(None),
        "float32": in_bfloat16(torch.float32),
        "float32, autocast": under_autocast(),
    }
    return [
        {
            **workload.description,
            "residual": name,
            "dtype": str(output.dtype),
            "error": relative_error(output, expected),
        }
        for name, output in outputs.items()
    ]


def estimate(workload: Workload) -> dict[str, float]:
    """GiB of a step at the official batch of a model on one GPU, by dtype of its residual stream."""
    official = next((text for text in OFFICIAL_WORKLOADS if text.startswith(f"{workload.model}:")), None)
    if official is None:
        return {}
    whole = parse_workload(official)
    _, largest = measure_masks(whole.config())
    return {
        residual: sum(memory_bytes(whole.config(f"runtime.residual={residual}"), largest, 1, on_cuda=True).values())
        / GIB
        for residual in ("bfloat16", "float32")
    }


COLUMNS = {
    "workload": lambda row: row["workload"],
    "residual": lambda row: row["residual"],
    "error": number("error", "{:.2%}"),
    "GiB of a step": number("estimated_gib", "{:.1f}"),
}


def main() -> None:
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, SMALL_BATCHES)
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results")
    options = parser.parse_args()
    rows: list[dict] = []
    for workload in chosen_workloads(options):
        memory = estimate(workload)
        rows += [row | {"estimated_gib": memory.get(row["residual"])} for row in measure(workload, device)]
        save(options.out, "residual", device, rows)
    print(text_table(COLUMNS, rows, num_names=2))


if __name__ == "__main__":
    main()
