"""How the pixels that an encoder was trained on are normalised: what is written beside weights, and found there.

A file of the official layout holds `pixel_mean` and `pixel_std`, lists of a number for each channel, if the settings of
the run set them. Folders of Hugging Face and timm say it in their JSON files, a `.safetensors` file in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

Values = tuple[float, ...] | None
Normalization = tuple[Values, Values]
"""Mean and standard deviation of each channel of pixels in [0, 1]; None where the default is meant."""

KEYS = ("pixel_mean", "pixel_std")
MAX_VALUE = "pixel_max_value"


def find_normalization(checkpoint: Mapping[str, Any]) -> Normalization:
    """The normalisation that belongs to what `read_checkpoint` has returned."""
    data = _settings_of(checkpoint)
    mean, std = (
        _to_numbers(checkpoint.get(key, data.get(name))) for key, name in zip(KEYS, ("mean", "std"), strict=True)
    )
    return mean, std


def list_normalization(checkpoint: Mapping[str, Any]) -> dict[str, list[float] | float]:
    """What a file of the official layout says about pixels; what has its default is left out."""
    found = zip(KEYS, find_normalization(checkpoint), strict=True)
    max_value = find_max_value(checkpoint)
    return {key: list(values) for key, values in found if values is not None} | (
        {} if max_value is None else {MAX_VALUE: max_value}
    )


def find_max_value(checkpoint: Mapping[str, Any]) -> float | None:
    """The value of images of more than 8 bits that counted as 1 in training (`data.max_value`); None: by their type."""
    value = checkpoint.get(MAX_VALUE, _settings_of(checkpoint).get("max_value"))
    return None if value is None else float(value)


def _settings_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `data` of the settings in a checkpoint folder; empty for files."""
    settings = checkpoint.get("config")
    return settings.get("data", {}) if isinstance(settings, Mapping) else {}


def read_normalization(path: Path) -> dict[str, Any]:
    """`pixel_mean` and `pixel_std` as files beside, or metadata of, a `.safetensors` file say them, if they do."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("preprocessing", "{}")
    texts = [(text, "mean", "std")]
    for name, mean, std in (("preprocessor_config.json", "image_mean", "image_std"), ("config.json", "mean", "std")):
        if path.name == "model.safetensors" and path.with_name(name).is_file():
            texts.append((path.with_name(name).read_text(errors="replace"), mean, std))
    for text, mean, std in texts:
        try:
            said = json.loads(text)
        except ValueError:
            continue
        said = said.get("pretrained_cfg", said) if isinstance(said, dict) else {}
        values = [_to_numbers(said.get(name)) for name in (mean, std)]
        if all(value is not None for value in values):
            return dict(zip(KEYS, values, strict=True))
    return {}


def _to_numbers(values: Any) -> Values:
    is_list = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
    return tuple(float(value) for value in values) if is_list else None
