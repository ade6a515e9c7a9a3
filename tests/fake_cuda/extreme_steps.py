"""Steps with masks of the sampler, and with the smallest and the largest that it can draw, on a fake GPU.

Prints how many graphs the first step compiles, and how many the others. The encoder has one block and the predictor
two, of which the last is compiled by itself.
"""

import json

import torch

from benchmarks.step.providers import parse_provider
from benchmarks.step.runs import Run
from benchmarks.workloads import Workload
from dmtjepa.devices import check_device
from dmtjepa.models.vit import ARCHITECTURES
from dmtjepa.training.distributed import process_group
from tests.helpers import no_machine_code  # noqa: F401
from tests.helpers.extreme_masks import extreme_masks

CIFAR10 = ("data.crop_size=32", "mask.patch_size=4", "mask.min_keep=4", "mask.sampler=corrected")
WORKLOADS = {
    "H/14": Workload("vit_huge", 128, ("meta.pred_depth=2",)),
    "CIFAR-10": Workload("vit_small", 256, ("meta.pred_depth=2", "meta.pred_emb_dim=192", *CIFAR10)),
}


def count_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    torch._inductor.config.triton.autotune_pointwise = False
    for architecture in ARCHITECTURES.values():
        architecture["depth"] = 1
    found = {}
    with process_group(check_device("cuda"), start_timeout=600, hang_timeout=3600) as world:
        for name, workload in WORKLOADS.items():
            run, before = Run(workload, parse_provider("project:pointwise", "cuda"), world), count_graphs()
            run.step(run.images, run.masks(0), 0)
            first = count_graphs()
            for masks in extreme_masks(workload, world.device):
                run.step(run.images, masks, 0)
            found[name] = {"first": first - before, "others": count_graphs() - first}
    print(json.dumps(found))
