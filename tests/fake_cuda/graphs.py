"""Training steps as CUDA graphs on a fake GPU; prints what was captured and replayed, step by step."""

import ctypes
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.step.host import count_calls
from benchmarks.step.providers import parse_provider
from benchmarks.step.runs import Run
from benchmarks.workloads import Workload
from dmtjepa.devices import check_device
from dmtjepa.training.distributed import process_group
from dmtjepa.training.estimate import memory_bytes
from dmtjepa.training.graphs import CaptureFailed, GraphedStep

TINY = ("data.crop_size=96", "mask.min_keep=2", "meta.pred_depth=1", "meta.pred_emb_dim=16", "optimization.clip_grad=1")
MOST_GRAPHS = 3


def count() -> dict[str, int]:
    library = ctypes.CDLL(None)
    names = ("replays", "replayed", "captures")
    return count_calls() | {name: getattr(library, f"fake_cuda_{name}")() for name in names}


def make_steps(run: Run, num_steps: int) -> list[dict]:
    rows = []
    step = run.step.step
    for number in range(num_steps):
        # Every fifth step is one that instruments measure.
        step.train_step.observer.measures = number % 5 == 4
        masks = run.masks(number)
        torch.cuda.synchronize()
        before = count()
        run.step(run.images, masks, number)
        after = count()
        shape = [masks.context_index.shape[1], masks.target_index.shape[2]]
        rows.append({name: after[name] - before[name] for name in after} | {"shape": shape, "graphs": step.num_graphs})
    return rows


def pool_bytes(step: GraphedStep) -> int:
    """Bytes of the memory that all graphs share."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == step._pool)


def overwritten_tables(step: GraphedStep) -> int:
    """How many graphs read the addresses of the gradients from the pool, where replays write over them."""
    pool = [
        (segment["address"], segment["address"] + segment["total_size"])
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) == step._pool
    ]
    addresses = [captured.gradient_address.data_ptr() for captured in step._graphs.values()]
    return sum(start <= address < end for address in addresses for start, end in pool)


def in_a_thread(function) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def fork() -> None:
    """A stream that takes part in the capture and is not waited for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.zeros(1, device="cuda")


def faults(run: Run) -> dict[str, str]:
    """What captures end in while something happens in this thread or in another one; empty where nothing is wrong."""
    before = torch.cuda.Event()
    before.record()
    disturbances = {
        "wait": torch.cuda.synchronize,
        "query": before.query,
        "fork": fork,
        "wait of a thread": lambda: in_a_thread(torch.cuda.synchronize),
        "query of a thread": lambda: in_a_thread(before.query),
    }
    return {name: fault_of(run, disturb) for name, disturb in disturbances.items()}


def fault_of(run: Run, disturb) -> str:
    """The error of a capture in which something happens; empty where there is none."""
    step = run.step.step
    loss = step.train_step.model.loss
    step._graphs.clear()
    step._pool = torch.cuda.graph_pool_handle()  # a failed capture leaves its own open
    step.train_step.observer.measures = False

    def disturbed(*arguments):
        if torch.cuda.is_current_stream_capturing():
            disturb()
        return loss(*arguments)

    step.train_step.model.loss = disturbed
    try:
        run.step(run.images, run.masks(0), 0)
    except CaptureFailed as error:
        return str(error)
    finally:
        step.train_step.model.loss = loss
    return ""


if __name__ == "__main__":
    workload, provider = Workload("vit_nano", 2, TINY), parse_provider("project:eager:fused:graphs", "cuda")
    with process_group(check_device("cuda"), start_timeout=600, hang_timeout=3600) as world:
        run = Run(workload, provider, world)
        run.step.step.most_graphs = MOST_GRAPHS
        rows = make_steps(run, int(sys.argv[1]))
        estimate = memory_bytes(workload.config(*provider.settings), workload.mask_shapes(0), 1, on_cuda=True)
        memory = {"pool": pool_bytes(run.step.step), "estimate": estimate["CUDA graphs"]}
        memory["overwritten_tables"] = overwritten_tables(run.step.step)
        print(json.dumps({"rows": rows, "memory": memory, "faults": faults(run)}))
