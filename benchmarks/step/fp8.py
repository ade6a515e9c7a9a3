"""What a teacher in float8 changes: its features, the neighbours they choose, the targets, and a short training run.

No time is measured here (`benchmarks.step.speed` does that on a GPU), so a CPU, which emulates the float8 products, is
enough.

Targets: drawn images through the teachers of the official sizes, in bfloat16 throughout and with float8 products in
their blocks (a scale per row, as in `runtime.teacher_precision: fp8`, or a scale per matrix), each against float32.
There are no official weights to measure on: `drawn` weights are those that training starts from; in `spread` ones
every channel of every norm and linear layer is scaled by exp(n/2), n normal, so that channels differ as trained ones
do. The quickstart's teacher is measured after its training run.

Training: the quickstart's model for a few hundred steps, with and without, from the same weights on the same batches;
then k-NN accuracy of the teacher. Other seeds show how far two runs are apart anyway.

    python -m benchmarks.step.fp8 [--workloads vit_base:4 vit_huge:4] [--steps 400] [--seeds 3] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import environment
from benchmarks.operators.cases import relative_error
from benchmarks.tables import number, save, text_table
from benchmarks.workloads import Workload, add_workloads, chosen_workloads
from dmtjepa.config import Config, load_config
from dmtjepa.data import build_eval_loader, build_loader
from dmtjepa.data.sources.shapes import ShapesParameters, draw_image
from dmtjepa.evaluation.features import extract_features
from dmtjepa.evaluation.knn import knn_accuracy, standardize
from dmtjepa.masks import MaskBatch, MaskSampler
from dmtjepa.models import fp8
from dmtjepa.models.replace_method import replace_method
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.training.optimizer import build_optimizer, set_schedules
from dmtjepa.training.schedules import build_schedules

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULT_WORKLOADS = ("vit_small:4", "vit_base:4", "vit_large:4", "vit_huge:4")


# ---- Features, neighbours and targets


def product_per_matrix(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The emulated product, had both matrices one scale each: their rows' largest."""

    def requantize(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (rows.float() * (scale / scale.max())).to(torch.float8_e4m3fn), scale.max().expand_as(scale)

    return fp8.emulated_product(*requantize(x, x_scale), *requantize(weight, weight_scale), bias)


def spread_channels(encoder: nn.Module) -> None:
    """Scale every channel of the blocks' norms and linear layers by exp(n/2)."""
    for module in encoder.blocks.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            weight = module.weight
            weight.mul_(torch.randn(len(weight), *[1] * (weight.ndim - 1)).div(2).exp())


def draw_images(count: int, side: int) -> Tensor:
    """[count, 3, side, side] uint8, one of each class in turn."""
    images = [draw_image(ShapesParameters(image_size=side), number % 10, number)[0] for number in range(count)]
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])


def compare_targets(name: str, weights: str, model: DMTJEPA, images: Tensor, masks: MaskBatch) -> Iterator[dict]:
    """One row for each way of computing the teacher, against the float32 one of `model`."""
    encoder, head = model.teacher_encoder, model.teacher_head
    grid_size = tuple(side // encoder.patch_size for side in images.shape[-2:])

    def chosen(h: Tensor) -> Tensor:
        return head._select_neighbors(h, masks.target_unique, grid_size, num_neighbors=head.num_neighbors)

    def compute(encoder: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        h = encoder(images).float()
        h = F.layer_norm(h, h.shape[-1:])
        targets = head.aggregate_neighbors(h, grid_size, masks.target_unique, masks.neighborhood)
        return h, chosen(h), targets

    expected_h, expected_chosen, expected_targets = compute(encoder)
    for variant in ("bfloat16", "fp8, scale per row", "fp8, scale per matrix"):
        other = copy.deepcopy(encoder).bfloat16()
        if variant != "bfloat16":
            fp8.compute_in_fp8(other.blocks, "cpu")
        if variant == "fp8, scale per matrix":
            for module in other.modules():
                if fp8.computes_in_fp8(module):
                    replace_method(module, "multiply", functools.partial(fp8.fp8_linear, product=product_per_matrix))
        h, neighbors, targets = compute(other)
        kept = (neighbors[:, :, None] == expected_chosen[:, None]).any(dim=2)
        yield {
            "workload": name,
            "weights": weights,
            "teacher": variant,
            "features": relative_error(h, expected_h),
            "neighbors_kept": float(kept.float().mean()),
            "sets_kept": float(kept.all(dim=1).float().mean()),
            "targets": relative_error(targets, expected_targets),
        }


@torch.no_grad()
def measure_targets(workload: Workload) -> Iterator[dict]:
    """Rows of a workload, with drawn and with spread weights."""
    images = draw_images(workload.batch_size, workload.image_size[0])
    masks = workload.masks(0)
    torch.manual_seed(0)
    model = build_model(workload.config("meta.pred_depth=1", "meta.pred_emb_dim=192"))  # the predictor is not used
    yield from compare_targets(workload.name, "drawn", model, images, masks)
    spread_channels(model.teacher_encoder)
    yield from compare_targets(workload.name, "spread", model, images, masks)


# ---- Training


def train(config: Config, num_steps: int, evaluate: Callable[[nn.Module], float]) -> tuple[dict, DMTJEPA]:
    """Train a model; returns the row of the run and the model."""
    loader = build_loader(config.data, seed=config.runtime.seed)
    schedules = build_schedules(config.optimization, loader.steps_per_epoch, config.data.batch_size)
    torch.manual_seed(config.runtime.seed)
    model = build_model(config)
    optimizer = build_optimizer([model.encoder, model.predictor, model.head])
    sampler = MaskSampler.from_config(config)
    losses = []
    while len(losses) < num_steps:
        for images in loader.epoch(len(losses) // loader.steps_per_epoch):
            step = len(losses)
            masks = sampler.sample(step)
            set_schedules(optimizer, schedules.learning_rate(step), schedules.decay(step))
            loss = model(images, masks)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_teacher(schedules.momentum(step))
            losses.append(loss.item())
            if len(losses) == num_steps:
                break
    loader.close()
    plain = copy.deepcopy(model.encoder)  # the teacher's weights are measured without rounding
    plain.load_state_dict(model.teacher_encoder.state_dict())
    row = {
        "teacher": config.runtime.teacher_precision,
        "seed": config.runtime.seed,
        "losses": losses,
        "last_loss": statistics.fmean(losses[-50:]),
        "knn": evaluate(plain),
    }
    return row, model


def knn_of(encoder: nn.Module, image_size: tuple[int, int]) -> float:
    """k-NN accuracy (k = 10) on the drawn images."""
    features = [
        extract_features(encoder, build_eval_loader(f"shapes:{split}", image_size, 250), progress=False)
        for split in ("train", "val")
    ]
    train_set, val_set = features
    pooled = standardize(train_set.pooled, val_set.pooled)
    return knn_accuracy(pooled[0], train_set.labels, pooled[1], val_set.labels, num_neighbors=(10,))[10]


def measure_training(num_steps: int, num_seeds: int) -> tuple[list[dict], list[dict]]:
    """Rows of the runs; rows of targets of the first trained teacher."""
    rows, trained = [], []
    for seed in range(num_seeds):
        for precision in ("same", "fp8"):
            overrides = [f"runtime.seed={seed}", f"runtime.teacher_precision={precision}", "data.num_workers=0"]
            config = load_config(CONFIGS / "quickstart.yaml", overrides)
            row, model = train(config, num_steps, lambda encoder, size=config.data.image_size: knn_of(encoder, size))
            rows.append(row)
            print(f"seed {seed}, {precision}: last loss {row['last_loss']:.5f}, k-NN {row['knn']:.3f}", flush=True)
            if not trained and precision == "same":
                images = draw_images(32, config.data.image_size[0])
                masks = MaskSampler.from_config(config, batch_size=len(images), seed=0).sample(step=0)
                with torch.no_grad():
                    trained = list(compare_targets("quickstart", f"after {num_steps} steps", model, images, masks))
    return rows, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workloads(parser, DEFAULT_WORKLOADS)
    parser.add_argument("--steps", type=int, default=400, help="of a training run; 0: none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for a JSON file of the results")
    options = parser.parse_args()
    started = environment("cpu")
    training, rows = measure_training(options.steps, options.seeds) if options.steps else ([], [])
    for workload in chosen_workloads(options):
        rows += measure_targets(workload)
    columns = {key: lambda row, key=key: row[key] for key in ("workload", "weights", "teacher")}
    columns["features, %"] = number("features", "{:.2f}", 100)
    columns["neighbours kept, %"] = number("neighbors_kept", "{:.1f}", 100)
    columns["sets kept, %"] = number("sets_kept", "{:.1f}", 100)
    columns["targets, %"] = number("targets", "{:.2f}", 100)
    print("\n" + text_table(columns, rows, num_names=3))
    save(options.out, "fp8", "cpu", rows, training=training, started_at_commit=started["commit"])


if __name__ == "__main__":
    main()
