"""The section `data` of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dmtjepa.config.paths import expand_path
from dmtjepa.config.schema import Fraction, Free, SameGlobalBatch, Section, check_range


class DataSettings(Section):
    """Where images come from and how they are cropped."""

    batch_size: SameGlobalBatch[int] = Field(256, ge=1, description="images per step on each device")
    color_jitter_strength: float = Field(0.0, ge=0, description="strength of the colour distortion")
    crop_scale: tuple[Fraction, Fraction] = Field((0.3, 1.0), description="area of the random crop, of the image's")
    crop_size: int | tuple[int, int] = Field(224, description="side of the crop in pixels, or [height, width]")
    image_folder: str = Field("", description="folder of the images, below root_path")
    num_workers: Free[int] = Field(10, ge=0, le=512, description="loader processes (or DALI threads) of each device")
    pin_mem: Free[bool] = Field(True, description="copy batches to CUDA devices from pinned memory")
    root_path: Free[str] = Field(
        "", description="folder that holds image_folder; together they name the images, see docs/data.md"
    )
    use_color_distortion: bool = Field(False, description="random colour jitter and greyscale")
    use_gaussian_blur: bool = Field(False, description="random Gaussian blur")
    use_horizontal_flip: bool = Field(False, description="random horizontal flip")
    channels: int = Field(
        3, ge=1, le=64, description="channels of an image: 3 is RGB, 1 is grey, others are taken as they are stored"
    )
    mean: tuple[float, ...] | None = Field(
        None,
        description="mean of each channel, of pixels in [0, 1], which is subtracted; null: ImageNet's for 3 channels, "
        "0.5 for others. `dmtjepa check` measures it",
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="standard deviation of each channel, which divides; null: ImageNet's for 3 channels, 0.25 for "
        "others",
    )
    max_value: float | None = Field(
        None,
        gt=0,
        description="value that counts as 1 in images of more than 8 bits, such as 4095 for 12 bits; null: that of "
        "their type, see docs/data.md",
    )
    dataset: Literal["folder", "shapes"] = Field("folder", description="a folder of images, or the drawn set `shapes`")
    loader: Literal["auto", "pil", "dali"] = Field(
        "auto",
        description="what decodes, crops and resizes: PIL in processes (earlier versions said torchvision, which is "
        "still read), or NVIDIA DALI; auto: DALI when it is installed",
    )
    max_broken: Free[float] = Field(0.01, ge=0, le=1, description="share of unreadable images above which a run stops")
    allow_changed: Free[bool] = Field(
        False, description="resume although the images, or what loads them, have changed since the checkpoint"
    )
    max_megapixels: float = Field(
        100, gt=0, le=178, description="larger images, by the size that they declare, count as unreadable"
    )
    hw_decoder_load: float = Field(0.7, ge=0, le=1, description="DALI on a GPU: JPEGs decoded in hardware")
    worker_timeout: Free[float] = Field(
        50, gt=0, description="seconds without an image until a loader counts as stalled"
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        for name in ("root_path", "image_folder"):
            value = getattr(self, name)
            if self.dataset == "shapes" and value:
                raise ValueError(
                    f"{name}: {value!r} has no effect with data.dataset: shapes; set data.dataset: folder to train on "
                    f"these images, or leave {name} empty"
                )
        return self

    @model_validator(mode="after")
    def _channels_agree(self) -> DataSettings:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name}: {len(values)} numbers for {self.channels} channels (data.channels)")
        if self.channels != 3 and self.dataset == "shapes":
            raise ValueError(f"channels: {self.channels}, but the drawn images of data.dataset: shapes have 3")
        if self.channels != 3 and self.use_color_distortion:
            raise ValueError(
                f"use_color_distortion: needs 3 channels, not data.channels: {self.channels}; set it to false"
            )
        if self.channels not in (1, 3) and self.loader == "dali":
            raise ValueError(
                f"loader: dali reads images of 1 or 3 channels, not data.channels: {self.channels}; set data.loader: "
                "pil"
            )
        return self

    @field_validator("root_path", "image_folder", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: Any) -> Any:
        return "" if value is None else value  # YAML's null, and what a shell leaves of data.image_folder=""

    @field_validator("loader", mode="before")
    @classmethod
    def _earlier_name(cls, value: Any) -> Any:
        return "pil" if value == "torchvision" else value

    @field_validator("crop_size")
    @classmethod
    def _positive_crop(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError("must be at least 1 pixel")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _ordered_scale(cls, value: tuple[float, float]) -> tuple[float, float]:
        check_range("crop_scale", *value)
        return value

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a crop, in pixels."""
        return self.crop_size if isinstance(self.crop_size, tuple) else (self.crop_size, self.crop_size)

    @property
    def path(self) -> Path:
        """The folder of the images, with ~ and environment variables expanded. Raises `ConfigError` for unset ones."""
        folder = expand_path(self.image_folder, "data.image_folder")
        if folder.startswith("hf:"):  # by itself, like an absolute path
            return Path(folder)
        return Path(expand_path(self.root_path, "data.root_path")) / folder
