"""A model card: what exported weights are, how they were trained and measured, and how to load them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import dmtjepa
from dmtjepa.checkpoint_format import is_checkpoint
from dmtjepa.config import Config, ConfigError, parse_config
from dmtjepa.interop.model_folder import describe_channels
from dmtjepa.interop.normalization import Normalization
from dmtjepa.interop.weights import EncoderShape
from dmtjepa.models.vit import IMAGENET_MEAN, IMAGENET_STD, default_normalization
from dmtjepa.run_folder import RunFolder, RunFolderError, open_run

PARTS = {"target_encoder": "teacher", "encoder": "student"}
FEATURES = {
    "trained": "teacher",
    "student": "student",
    "start": "the weights that it started from",
    "untrained": "untrained network",
    "pixels": "pixels",
}
"""Names of features in a report -> in a card."""
# Settings that say how weights came about. The others name files and machines, or do not change results.
SHOWN = ("data", "mask", "patch", "meta", "optimization")
HIDDEN = {
    "data": {
        "root_path",
        "image_folder",
        "num_workers",
        "pin_mem",
        "worker_timeout",
        "allow_changed",
        "max_broken",
        "hw_decoder_load",
    },
    "meta": {"read_checkpoint", "load_checkpoint", "copy_data"},
}


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    config: settings of the run; None for weights by themselves.
    numbers: beside the weights in their file: `epoch`, `step`, `loss`, ...
    start: the last entry of `environment.json` of the run.
    report: what `dmtjepa evaluate` has measured of the same epoch.
    """

    numbers: Mapping[str, Any]
    config: Config | None = None
    start: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None


def find_origin(path: Path, checkpoint: Mapping[str, Any]) -> Origin:
    """What is known of the weights that `read_checkpoint(path)` has returned."""
    numbers = {name: value for name, value in checkpoint.items() if isinstance(value, (int, float))}
    folder = path.parent.parent if is_checkpoint(path) else path.parent
    try:
        if is_checkpoint(path):
            config = parse_config(checkpoint.get("config", {}), source=str(path))
        else:
            run, config = open_run(folder)
            if not run.holds(path):  # some other weights, copied into the folder of a run
                return Origin(numbers)
    except (ConfigError, RunFolderError):  # no run, one of another version, or another program's settings
        return Origin(numbers)
    run = RunFolder(folder, config.logging.write_tag)
    return Origin(numbers, config, (run.read_starts() or [{}])[-1], _read_report(run, numbers.get("epoch")))


def _read_report(run: RunFolder, epoch: float | None) -> dict[str, Any] | None:
    """The numbers of the report, if they are of this epoch."""
    try:
        report = json.loads(run.report_file.read_text())
        return report if epoch is not None and report["run"]["epoch"] == epoch else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def format_card(
    shape: EncoderShape,
    image_size: tuple[int, int] | None,
    origin: Origin,
    parts: tuple[str, ...],
    loading: str,
    library: str | None = None,
    normalization: Normalization = (None, None),
) -> str:
    """The card as Markdown.

    Args:
        shape: of the encoder.
        image_size: height and width that it is written for. None: those of the training.
        origin: of the weights.
        parts: what the file holds, such as `target_encoder`.
        loading: Python code that loads it.
        library: which Hugging Face's hub shall offer for it.
        normalization: of the pixels, see `find_normalization`.
    """
    if image_size is None and origin.config is not None:
        image_size = origin.config.data.image_size
    lines = []
    if library is not None:
        front = {"library_name": library, "pipeline_tag": "image-feature-extraction", "tags": ["self-supervised"]}
        lines += ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---"]
    lines += [f"# {shape.model_name or 'Vision transformer'}, patches of {shape.patch_size}", ""]
    lines += [_describe(shape, image_size, origin, parts), ""]
    lines += ["## Load", "", "```python", loading, "```", ""]
    lines += [
        f"Images: {describe_channels(shape.num_channels)}, the shorter side resized to 256/224 of the crop (bilinear), "
        f"central crop, divided by 255, normalised by {_describe_normalization(shape, normalization)}. Features of an "
        "image: the average over its patches.",
        "",
    ]
    lines += ["## Training", "", *_format_training(origin), "", "## Evaluation", "", *_format_evaluation(origin)]
    return "\n".join(lines) + "\n"


def _describe_normalization(shape: EncoderShape, normalization: Normalization) -> str:
    default = default_normalization(shape.num_channels)
    mean, std = (given or usual for given, usual in zip(normalization, default, strict=True))
    if (mean, std) == (IMAGENET_MEAN, IMAGENET_STD):
        return "ImageNet's mean and standard deviation"
    return f"the mean {_list(mean)} and the standard deviation {_list(std)}"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _describe(shape: EncoderShape, image_size: tuple[int, int] | None, origin: Origin, parts: tuple[str, ...]) -> str:
    size = f" Images of {image_size[0]}x{image_size[1]} pixels." if image_size is not None else ""
    method = ""
    if origin.config is not None:
        dmt = origin.config.patch.local_agg_head
        method = f" with {'DMT-JEPA (arXiv 2405.17995)' if dmt else 'I-JEPA (arXiv 2301.08243)'}"
        if origin.config.optimization.context_loss:
            method += " and a loss on the visible patches (arXiv 2603.14482)"
    held = " and ".join(f"the {PARTS[part]}" for part in parts)
    return (
        f"An image encoder without class token, trained without labels{method}: {held}. Width {shape.embed_dim}, "
        f"{shape.depth} blocks.{size} Written by dmtjepa {dmtjepa.__version__}."
    )


def _format_training(origin: Origin) -> list[str]:
    names = {"epoch": "epochs", "step": "steps", "loss": "mean loss of the last epoch"}
    rows = [(title, origin.numbers[name]) for name, title in names.items() if name in origin.numbers]
    if "global_batch" in origin.start:
        rows.append(("images per step", origin.start["global_batch"]))
    config = origin.config
    if config is None:
        known = [f"{title}: {_format_number(value)}" for title, value in rows]
        return [f"The file was exported without its run, so its settings are not known. {'; '.join(known)}".rstrip()]
    images = Path(config.data.image_folder or config.data.root_path).name
    if config.data.dataset == "shapes":
        images = "drawn by this project (`shapes`)"
    lines = [
        "| | |",
        "|---|---|",
        f"| images | {images} |",
        *(f"| {title} | {_format_number(value)} |" for title, value in rows),
    ]
    values = config.model_dump(mode="json")
    shown = {
        section: {key: value for key, value in values[section].items() if key not in HIDDEN.get(section, ())}
        for section in SHOWN
    }
    if config.meta.read_checkpoint is not None:
        lines.append(f"| started from | {Path(config.meta.read_checkpoint).name} |")
    return [*lines, "", "```yaml", yaml.safe_dump(shown, sort_keys=False, default_flow_style=None).rstrip(), "```"]


def _format_number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _format_evaluation(origin: Origin) -> list[str]:
    """A table of the report: k-NN with the largest k up to 20, linear probe and mIoU."""
    report = origin.report
    if report is None:
        return ["No report of these weights was found. `dmtjepa evaluate` writes one; export again to have it here."]
    data = report.get("data", {})
    num_images = data.get("validation_images")
    knn, linear, segmentation = (report.get(name) or {} for name in ("knn", "linear", "segmentation"))
    columns: dict[str, Mapping[str, float]] = {}
    ks = sorted(int(k) for k in knn.get("trained", {}))
    if ks:
        k = str(max((k for k in ks if k <= 20), default=ks[0]))
        columns[f"k-NN, k = {k}"] = {name: accuracy[k] for name, accuracy in knn.items()}
    if linear:
        columns["linear probe"] = linear
    if segmentation:
        columns["mIoU"] = {name: scores["mean_iou"] for name, scores in segmentation.items()}
    if not columns:
        return ["The report has no accuracies: its images have no labels."]
    lines = [f"| % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, title in FEATURES.items():
        cells = [_format_score(values.get(name), kind, num_images) for kind, values in columns.items()]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    classes = f" of {data['classes']} classes" if data.get("classes") else ""
    images = f"{data.get('train_images')} training and {num_images} validation images{classes}"
    return [*lines, "", f"Frozen features, on {images}; ± is the standard error of an accuracy."]


def _format_score(value: float | None, kind: str, num_images: int | None) -> str:
    if value is None:
        return "-"
    if kind == "mIoU" or not num_images:
        return f"{100 * value:.1f}"
    return f"{100 * value:.1f} ± {100 * math.sqrt(value * (1 - value) / num_images):.1f}"
