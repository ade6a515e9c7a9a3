"""An official configuration as it is, on one GPU: what it prints is measured, or counted, on its steps.

Compiled without choosing among kernels, which would need timings and takes most of the time.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.step.host import count_calls
from benchmarks.step.providers import parse_provider
from benchmarks.step.runs import Run
from benchmarks.workloads import Workload
from dmtjepa.masks import MaskBatch
from dmtjepa.masks.geometry import reachable_sizes
from dmtjepa.masks.placement import draw_sizes
from dmtjepa.training.distributed import check_device, process_group
from dmtjepa.training.estimate import memory_bytes

STEPS = 12  # of different masks


def extreme_masks(workload: Workload) -> Iterator[MaskBatch]:
    """The smallest and the largest masks that the sampler can draw: target blocks of a step, any context."""
    config, grid_size = workload.config(), workload.grid_size
    largest_context = max(map(math.prod, reachable_sizes(config.mask.enc_mask_scale, (1, 1), grid_size, "released")))

    def target_area(step: int) -> int:
        return math.prod(draw_sizes(config.mask, grid_size, 0, step)[0])

    for choose, context in ((min, config.mask.min_keep + 1), (max, largest_context)):
        masks = workload.masks(choose(range(200), key=target_area))
        yield replace(masks, context_index=torch.arange(context).repeat(workload.batch_size, 1))


if __name__ == "__main__":
    torch._inductor.config.triton.autotune_pointwise = False
    workload, provider = Workload("vit_base", 256), parse_provider("project:pointwise", "cuda")
    with process_group(check_device("cuda"), start_timeout=600, hang_timeout=3600) as world:
        run = Run(workload, provider, world)
        contexts = [workload.masks(step).context_index.shape[1] for step in range(STEPS)]
        for step in range(STEPS):
            run(step)
        largest = max(range(STEPS), key=workload.flops)
        memory = run.measure_memory(largest)
        masks = run.masks(largest)
        before = count_calls()
        run.step(run.images, masks, largest)
        after = count_calls()
        for masks in extreme_masks(workload):
            run.step(run.images, masks.to(world.device), STEPS)
            contexts.append(masks.context_index.shape[1])
    estimate = memory_bytes(workload.config(*provider.settings), workload.mask_shapes(largest), 1, on_cuda=True)
    calls = {name: after[name] - before[name] for name in after}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = {"estimate": sum(estimate.values()), "peak": memory["peak_bytes"], "graphs": graphs, **calls}
    print(json.dumps(found | {"contexts": contexts}))
