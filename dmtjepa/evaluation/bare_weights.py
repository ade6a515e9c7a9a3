"""Settings for weights without a run folder: what their shapes tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmtjepa.config import Config, parse_config
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.interop import describe_encoder, find_max_value, find_normalization, get_part, read_checkpoint
from dmtjepa.masks import MaskError, check_masks

# Masks are only drawn as a figure. On small grids, those of configs/quickstart.yaml fit.
MASKS: tuple[dict[str, Any], ...] = ({}, {"pred_mask_scale": [0.2, 0.35], "sampler": "corrected"})


def settings_of_weights(path: Path) -> Config:
    """Settings with which the encoder at `path` can be measured: architecture, patch size and image size.

    Everything else has its default, and there is no aggregation head: neighbours are not drawn.

    Raises:
        WeightsError: the file cannot be read, or holds no teacher.
        EvaluationError: its encoder is of no architecture known here, its images are not square, or its grid is too
            small for masks.
    """
    checkpoint = read_checkpoint(path)
    shape = describe_encoder(get_part(checkpoint, "target_encoder", path), path)
    mean, std = find_normalization(checkpoint)
    side = round(shape.num_patches**0.5)
    if shape.model_name is None or side**2 != shape.num_patches:
        raise EvaluationError(f"{path} holds {shape}: give the run folder, whose settings describe it")
    data = {
        "crop_size": side * shape.patch_size,
        "channels": shape.num_channels,
        "mean": mean,
        "std": std,
        "max_value": find_max_value(checkpoint),
    }
    reason: MaskError | None = None
    for masks in MASKS:
        settings = {
            "data": data,
            "mask": {"patch_size": shape.patch_size, "min_keep": 1, **masks},
            "meta": {"model_name": shape.model_name},
            "patch": {"local_agg_head": False},
        }
        config = parse_config(settings, source=str(path))
        try:
            check_masks(config.mask, config.grid_size)
            return config
        except MaskError as error:
            reason = reason or error
    raise EvaluationError(f"{path} holds {shape}, a grid too small for masks: {reason}") from reason
