"""PREDICTION, not measurement: step time and efficiency of a run on 8 to 1,024 GPUs, from formulas.

    python -m benchmarks.step.communication

Per step and GPU, with P and Q parameters of student and teacher, FSDP moves over its group of S GPUs

    all-gather       bfloat16   2 Q in the teacher's forward pass, 2 P in the student's forward and 2 P in its backward
    reduce-scatter   float32    4 P in the backward pass

and HSDP (S GPUs of a node, n nodes) also all-reduces each shard, float32, over the nodes: 2 * 4 P / S. Steps have one
micro-batch (runtime.accumulation): each further one gathers and reduce-scatters again, and all-reduces nothing. With V
bytes over a ring of W members, a collective of bandwidth b and latency a per hop takes

    t = V (W - 1) / W / b + (W - 1) a            all-gather, reduce-scatter; u units of parameters make u collectives
    t = 2 V (W - 1) / W / b + 2 log2(W) a        all-reduce (tree)

Communication runs beside the computation of the same phase, and what exceeds it is waited for:

    step = T + imbalance + sum over phases of max(0, t_phase - T_phase) + first all-gather + last reduction

T is the predicted time of one GPU's computation, on an H200 the measured one, divided among phases by FLOPs. The
imbalance is that of masks cut per rank: the slowest rank has the longest contexts. mask.context_cut: global removes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from benchmarks.predictions import PREDICTIONS
from benchmarks.workloads import parse_workload
from dmtjepa.objective import build_model
from dmtjepa.training.estimate import measure_masks, step_flops
from dmtjepa.training.parallelize import group_fsdp_units


@dataclass(frozen=True)
class Machine:
    """A node of 8 GPUs. Bandwidths are what NCCL reaches in one direction, assumed from public reports, in bytes/s."""

    name: str
    within: float  # NVLink, per GPU
    between: float  # InfiniBand, per GPU (8 adapters a node)
    hop_within: float = 2e-6  # seconds
    hop_between: float = 8e-6


@dataclass(frozen=True)
class Model:
    """An official run: batch per GPU, seconds of computation by GPU, and the sizes that its settings determine."""

    name: str
    batch: int
    seconds: dict[str, float]
    teacher_share: float  # of the computation, by FLOPs: the teacher
    forward_share: float  # the student's forward pass
    context_share: float  # everything that grows with the context
    student: int  # parameters
    teacher: int
    units: int  # FSDP units of student and teacher on 8 GPUs


@cache
def official_model(name: str) -> Model:
    """The model of a prediction, with the sizes that this package computes."""
    prediction = PREDICTIONS[name]
    workload = parse_workload(prediction.workload)
    config = workload.config()
    flops = step_flops(config, measure_masks(config)[0])
    context = flops["context encoder"] + flops["context head"]
    with torch.device("meta"):
        model = build_model(config)
    encoders = (model.teacher_encoder.blocks, model.encoder.blocks, model.predictor.predictor_blocks)
    num_block_units = sum(len(group_fsdp_units(blocks, EightGpus())) for blocks in encoders)
    return Model(
        name,
        workload.batch_size,
        prediction.seconds | MEASURED.get(name, {}),
        teacher_share=(flops["teacher encoder"] + flops["target head"]) / sum(flops.values()),
        forward_share=(context + flops["predictor"]) / 3 / sum(flops.values()),
        context_share=context / sum(flops.values()),
        student=num_parameters(model.encoder, model.predictor, model.head),
        teacher=num_parameters(model.teacher_encoder, model.teacher_head),
        units=num_block_units + 6,  # both encoders, both heads, the predictor, and the model itself
    )


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


class EightGpus:
    """The part of a DeviceMesh that decides which blocks form an FSDP unit."""

    device_type = "cuda"

    def __getitem__(self, name: str) -> EightGpus:
        return self

    def size(self) -> int:
        return 8


A100 = Machine("A100, NVLink 3, 8 x HDR", within=230e9, between=20e9)
H100 = Machine("H100, NVLink 4, 8 x NDR", within=360e9, between=42e9)
H200 = Machine("H200, NVLink 4, 8 x NDR", within=360e9, between=42e9)
# Seconds of a step of one GPU: docs/h200.md.
MEASURED = {"ViT-B/16": {"H200": 0.072}, "ViT-H/14": {"H200": 0.217}}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Mean of the longest context over W ranks above the mean context (68.3 patches at 16x16; 77.9 over 16 ranks measured).
SPREAD = 0.14 / math.sqrt(2 * math.log(16))


def predict(model: Model, machine: Machine, gpus: int, hybrid: bool) -> float:
    """Seconds of a step."""
    compute = model.seconds[machine.name[:4]]
    nodes = gpus // 8
    group = 8 if hybrid else gpus
    crosses = group > 8
    bandwidth = min(machine.within, 8 * machine.between) if crosses else machine.within
    hop = machine.hop_between / 8 + machine.hop_within * 7 / 8 if crosses else machine.hop_within

    def gather(volume: float, units: float) -> float:
        return volume * (group - 1) / group / bandwidth + units * (group - 1) * hop

    def reduce_copies(volume: float, units: float) -> float:
        if not hybrid or nodes == 1:
            return 0.0
        shard = volume / 8
        return 2 * shard * (nodes - 1) / nodes / machine.between + units * 2 * math.log2(nodes) * machine.hop_between

    units = model.units / 2  # of the student; the teacher has about as many
    phases = (
        (model.teacher_share, gather(2 * model.teacher, units)),
        (model.forward_share, gather(2 * model.student, units)),
        (
            1 - model.teacher_share - model.forward_share,
            gather(2 * model.student, units)
            + gather(4 * model.student, units)
            + reduce_copies(4 * model.student, units),
        ),
    )
    exposed = sum(max(0.0, time - share * compute) for share, time in phases)
    ends = gather(2 * model.teacher / units, 1) + gather(4 * model.student / units, 1)
    ends += reduce_copies(4 * model.student / units, 1)
    imbalance = compute * model.context_share * SPREAD * math.sqrt(2 * math.log(gpus))
    return compute + imbalance + exposed + ends


def main() -> None:
    print("PREDICTED step time (ms) and efficiency against one GPU's computation\n")
    for machine in (A100, H100, H200):
        print(f"{machine.name}\n")
        header = "| run | layout | " + " | ".join(map(str, GPUS)) + " |"
        print(header)
        print("|---" * (2 + len(GPUS)) + "|")
        models = [model for model in map(official_model, PREDICTIONS) if machine.name[:4] in model.seconds]
        for model in models:
            for hybrid in (False, True):
                row = [model.name, "HSDP, 8 shards" if hybrid else "FSDP"]
                for gpus in GPUS:
                    seconds = predict(model, machine, gpus, hybrid)
                    row.append(f"{1000 * seconds:.0f} ({model.seconds[machine.name[:4]] / seconds:.0%})")
                print("| " + " | ".join(row) + " |")
        print()


if __name__ == "__main__":
    main()
