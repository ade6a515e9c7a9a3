"""An official configuration as it is, on one GPU: what it prints is measured, or counted, on its steps.

Compiled without choosing among kernels, which would need timings.
"""

import json

import torch

from benchmarks.step.host import count_calls
from benchmarks.step.providers import parse_provider
from benchmarks.step.runs import Run
from benchmarks.workloads import Workload
from dmtjepa.devices import check_device
from dmtjepa.training.distributed import process_group
from dmtjepa.training.estimate import memory_bytes
from tests.helpers import no_machine_code  # noqa: F401
from tests.helpers.extreme_masks import extreme_masks

STEPS = 12  # of different masks

if __name__ == "__main__":
    torch._inductor.config.triton.autotune_pointwise = False
    workload, provider = Workload("vit_base", 256), parse_provider("project:pointwise", "cuda")
    with process_group(check_device("cuda"), start_timeout=600, hang_timeout=3600) as world:
        run = Run(workload, provider, world)
        for step in range(STEPS):
            run(step)
        largest = max(range(STEPS), key=workload.flops)
        memory = run.measure_memory(largest)
        masks = run.masks(largest)
        before = count_calls()
        run.step(run.images, masks, largest)
        after = count_calls()
        for masks in extreme_masks(workload, world.device):
            run.step(run.images, masks, STEPS)
    shapes = {workload.masks(step).context_index.shape[1] for step in range(STEPS)}
    estimate = memory_bytes(workload.config(*provider.settings), workload.mask_shapes(largest), 1, on_cuda=True)
    calls = {name: after[name] - before[name] for name in after}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = {"estimate": sum(estimate.values()), "peak": memory["peak_bytes"], "graphs": graphs, **calls}
    print(json.dumps(found | {"context_sizes": len(shapes)}))
