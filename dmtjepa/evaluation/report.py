"""The report of a run: k-NN and linear accuracy of its teacher beside an untrained network and raw pixels, collapse
numbers, segmentation where there are masks, and figures; written as report.md, report.json and PNG files.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmtjepa.config import Config
from dmtjepa.data import build_eval_loader
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.evaluation.collapse import collapse_numbers
from dmtjepa.evaluation.features import LAYOUT_SIDE, Features, extract_features, extract_patches, extract_pixels
from dmtjepa.evaluation.figures import FigureData, pick_queries, read_losses, save_figures
from dmtjepa.evaluation.formatting import Report, format_markdown
from dmtjepa.evaluation.knn import knn_accuracy, standardize
from dmtjepa.evaluation.linear import fit_linear
from dmtjepa.evaluation.segmentation import find_mask, read_mask, score_segmentation
from dmtjepa.evaluation.splits import Splits, subsample
from dmtjepa.interop import get_part, load_weights, read_checkpoint
from dmtjepa.kernels import select_neighbors
from dmtjepa.masks import sample_masks
from dmtjepa.objective import build_model

NUM_SHOWN = 5
"""Images shown in a row."""
NUM_CENTERED = 200
"""Images whose mean patch feature at each place is taken away before principal components are drawn."""
NUM_SEGMENTED = 300
"""Images of either split whose patches are segmented."""
LAYOUT_BYTES = 8 * 2**30
"""Memory that features with layout may take; there are 16 times as many as of pooled ones."""
RANKED = 25_600
"""Images that collapse numbers are taken of, as many as RankMe's authors take."""


def evaluate(
    run: Path,
    config: Config,
    checkpoint_path: Path,
    splits: Splits,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: bool = True,
) -> Report:
    """Measure the teacher of a run and write the report into `out`.

    Raises:
        WeightsError: the checkpoint has no teacher, or it does not fit the config.
        DataError: a split has too few readable images.
    """
    trained, untrained = load_teacher(config, checkpoint_path, device)
    checkpoint = read_checkpoint(checkpoint_path)
    report = Report(
        run={
            "folder": str(run),
            "checkpoint": str(checkpoint_path),
            "model": config.meta.model_name,
            "patch_size": config.mask.patch_size,
            "image_size": list(config.data.image_size),
            "parameters": sum(p.numel() for p in trained.parameters()),
            "epoch": _number(checkpoint.get("epoch")),
            "seed": config.runtime.seed,
            "torch": torch.__version__,
        },
        data={
            "description": splits.description,
            "train_images": len(splits.train),
            "validation_images": len(splits.validation),
            "classes": len(splits.train.class_names) if splits.unlabelled is None else None,
        },
    )
    _measure_features(report, config, trained, untrained, splits, device, num_workers, progress)
    _measure_segmentation(report, config, {"trained": trained, "untrained": untrained}, splits, device)
    figures = _collect_figures(report, run, config, trained, untrained, splits, device)
    title = f"{run.resolve().name}: {config.meta.model_name}, patch {config.mask.patch_size}"
    paths = save_figures(figures, out, title)
    report.files = [str(path) for path in [out / "report.md", out / "report.json", *paths]]
    (out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    (out / "report.md").write_text(format_markdown(report, [path.name for path in paths]))
    return report


def load_teacher(
    config: Config, checkpoint_path: Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, nn.Module]:
    """The run's teacher encoder, and the untrained encoder that it started from (same architecture, same seed).

    Raises:
        WeightsError: the checkpoint has no teacher, or it does not fit the config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        runtime = config.runtime.model_copy(update={"teacher_precision": "same"})  # in which weights are measured
        model = build_model(config.model_copy(update={"runtime": runtime}), torch.device(device).type)
    trained, untrained = model.teacher_encoder, model.encoder
    weights = get_part(read_checkpoint(checkpoint_path), "target_encoder", checkpoint_path)
    load_weights(trained, weights, checkpoint_path)
    return trained.to(device).eval(), untrained.to(device).eval().requires_grad_(False)


def _measure_features(
    report: Report,
    config: Config,
    trained: nn.Module,
    untrained: nn.Module,
    splits: Splits,
    device: torch.device | str,
    num_workers: int,
    progress: bool,
) -> None:
    """k-NN, linear probes and collapse numbers."""
    settings = config.evaluation

    def load(source: ImageSource):
        return build_eval_loader(source, config.data.image_size, settings.batch_size, num_workers=num_workers)

    fields = math.prod(min(LAYOUT_SIDE, side) for side in config.grid_size)
    layout_bytes = 2 * 4 * fields * trained.embed_dim * (len(splits.train) + len(splits.validation))
    grid_size = config.grid_size if splits.unlabelled is None and layout_bytes <= LAYOUT_BYTES else None

    def extract(encoder: nn.Module, source: ImageSource, description: str) -> Features:
        return extract_features(
            encoder, load(source), device=device, grid_size=grid_size, description=description, progress=progress
        )

    encoders = {"trained": trained, "untrained": untrained}
    validation = {
        name: extract(encoder, splits.validation, f"{name}, validation") for name, encoder in encoders.items()
    }
    for name, features in validation.items():
        if len(features.pooled) > 1:
            report.collapse[name] = asdict(collapse_numbers(features.pooled[:RANKED]))
            if name == "trained":
                report.collapsed = collapse_numbers(features.pooled[:RANKED]).collapsed
    if splits.unlabelled is not None:
        report.skipped.append(f"k-NN and linear probe: {splits.description} has no labels ({splits.unlabelled})")
        return
    train = {name: extract(encoder, splits.train, f"{name}, training") for name, encoder in encoders.items()}
    validation["pixels"], train["pixels"] = extract_pixels(load(splits.validation)), extract_pixels(load(splits.train))
    fitting = tuple(k for k in settings.neighbors if k <= len(train["trained"].pooled))
    if fitting != settings.neighbors:
        report.skipped.append(f"k-NN with k above the {len(train['trained'].pooled)} training images")
    for name, features in validation.items():
        rows = (train[name].pooled, train[name].labels, features.pooled, features.labels)
        if fitting:
            gallery, queries = train[name].pooled, features.pooled
            if name != "pixels":  # pixels, less their image's mean, do better without
                gallery, queries = standardize(gallery, queries)
            search = (gallery, train[name].labels, queries, features.labels)
            report.knn[name] = knn_accuracy(*search, num_neighbors=fitting, device=device)
            report.knn_plain[name] = knn_accuracy(*search, num_neighbors=fitting, weighted=False, device=device)
        if fitting and features.layout is not None:
            gallery, queries = standardize(train[name].layout, features.layout)
            report.knn_layout[name] = knn_accuracy(
                gallery, train[name].labels, queries, features.labels, num_neighbors=fitting, device=device
            )
        if name != "pixels":
            probe = fit_linear(*rows[:2], device=device)
            report.linear[name] = probe.accuracy(*rows[2:])
    if grid_size is None:
        report.skipped.append(
            f"k-NN with layout: its features would take {layout_bytes / 2**30:.0f} GiB, {LAYOUT_BYTES / 2**30:.0f} are "
            "allowed; see --max-images"
        )
    labels = validation["trained"].labels
    report.data["validation_images"] = len(labels)
    report.data["most_frequent_class"] = (labels.bincount().max() / len(labels)).item()


def _measure_segmentation(
    report: Report, config: Config, encoders: dict[str, nn.Module], splits: Splits, device: torch.device | str
) -> None:
    parts = [subsample(source, NUM_SEGMENTED) for source in (splits.train, splits.validation)]
    if find_mask(parts[0].name(0)) is None or find_mask(parts[1].name(0)) is None:
        report.skipped.append("segmentation: there are no pixel masks beside the images (see docs/evaluation.md)")
        return
    loaded = [_load_masked(part, config, config.evaluation.batch_size) for part in parts]
    for name, encoder in encoders.items():
        (train_patches, train_masks), (patches, masks) = [
            (torch.cat([extract_patches(encoder, batch, device=device) for batch in images]), masks)
            for images, masks in loaded
        ]
        scores = score_segmentation(train_patches, train_masks, patches, masks, config.grid_size, device=device)
        report.segmentation[name] = asdict(scores)


def _load_masked(source: ImageSource, config: Config, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """Batches of images, and the masks [n,H,W] of all; images without one are left out."""
    images, masks = [], []
    for batch, _, names in build_eval_loader(source, config.data.image_size, batch_size):
        paths = [find_mask(name) for name in names]
        images.append(batch[[i for i, path in enumerate(paths) if path is not None]])
        masks += [read_mask(path, config.data.image_size) for path in paths if path is not None]
    return images, torch.stack(masks)


def _collect_figures(
    report: Report,
    run: Path,
    config: Config,
    trained: nn.Module,
    untrained: nn.Module,
    splits: Splits,
    device: torch.device | str,
) -> FigureData:
    loader = build_eval_loader(subsample(splits.validation, NUM_SHOWN), config.data.image_size, NUM_SHOWN)
    images = torch.cat([batch for batch, _, _ in loader])
    patches = extract_patches(trained, images, device=device)
    masks = sample_masks(config.mask, config.grid_size, len(images), config.runtime.seed, step=0, rank=0)
    loss = None
    path = run / f"{config.logging.write_tag}_r0.csv"
    if path.is_file():
        loss = read_losses(path)
        if len(loss.loss):
            window = max(1, len(loss.loss) // 50)
            report.loss = {
                "steps": len(loss.loss),
                "first": float(np.mean(loss.loss[:window])),
                "last": float(np.mean(loss.loss[-window:])),
            }
    else:
        report.skipped.append(f"loss curve: the run has no {path.name}")
    query_index = neighbor_index = None
    if config.patch.local_agg_head:
        query_index = pick_queries(config.grid_size)
        neighbor_index = _choose_neighbors(patches, query_index, config)
    return FigureData(
        grid_size=config.grid_size,
        images=images,
        context_index=masks.contexts(config.grid_size[0] * config.grid_size[1]),
        target_index=masks.target_index,
        query_index=query_index,
        neighbor_index=neighbor_index,
        window=config.patch.patch_k_size,
        patches=patches - _mean_patches(trained, splits.validation, config, device),
        untrained_patches=extract_patches(untrained, images, device=device)
        - _mean_patches(untrained, splits.validation, config, device),
        loss=loss,
        accuracy=report.knn or None,
        chance=report.data.get("most_frequent_class"),
    )


def _mean_patches(encoder: nn.Module, source: ImageSource, config: Config, device: torch.device | str) -> Tensor:
    """Mean feature of every place on the grid, [N,D]: what a patch says of its place, not of the image."""
    loader = build_eval_loader(subsample(source, NUM_CENTERED), config.data.image_size, config.evaluation.batch_size)
    total, count = 0.0, 0
    for images, _, _ in loader:
        total = total + extract_patches(encoder, images, device=device).sum(0)
        count += len(images)
    return total / count


def _choose_neighbors(patches: Tensor, query_index: Tensor, config: Config) -> Tensor:
    """Neighbours of the query patches, chosen as for targets: patches [B,N,D], queries [Q] -> [B,Q,K], -1 missing."""
    batch, num_patches, width = patches.shape
    h = F.layer_norm(patches, (width,))
    flat = (torch.arange(batch)[:, None] * num_patches + query_index).flatten()
    chosen = select_neighbors(
        h,
        flat,
        config.grid_size,
        num_neighbors=config.patch.patch_k_num,
        window=config.patch.patch_k_size,
        border=config.patch.border,
    )
    return torch.where(chosen >= 0, chosen % num_patches, -1).view(batch, len(query_index), -1)


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None
