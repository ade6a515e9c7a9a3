"""The figures of a report: what they show, and how they are arranged on the page.

`dmtjepa.evaluation.drawing` draws into single axes; `save_figures` writes one file per figure and one with all of them,
`report.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dmtjepa.data.sources.base import make_printable
from dmtjepa.evaluation.retrieval import NearestImages
from dmtjepa.evaluation.segmentation import SegmentedImages
from dmtjepa.files import open_atomically
from dmtjepa.step_csv import LossCurve

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase
    from PIL.Image import Image

WIDTH = 15.0
"""Width of the composite in inches."""
DPI = 110
CURVES = ("loss", "accuracy")
"""Figures that are half as wide as the composite."""


@dataclass(frozen=True)
class FigureData:
    """What the figures show. Tensors are on the CPU; figures whose data is None are left out.

    images: uint8 [B,3,H,W]. grid_size: rows and columns of patches, N patches in all.
    context_index: [C] for each image, target_index: [B,M,T]; patches of the masks.
    query_index: [Q], patches whose neighbours are shown; neighbor_index: [B,Q,K], most similar first, -1 if missing.
    patches, untrained_patches: float [B,N,D], patch features minus their mean at each position.
    accuracy: name of the features -> {k: accuracy from 0 to 1}; chance: share of the most frequent class.
    segmented: images with masks. nearest: the nearest images of `images`.
    names: [B], labels: int64 [B], features: float [B,D], pooled; of `images`.
    """

    grid_size: tuple[int, int]
    images: Tensor | None = None
    context_index: Sequence[Tensor] | None = None
    target_index: Tensor | None = None
    query_index: Tensor | None = None
    neighbor_index: Tensor | None = None
    window: int = 3
    patches: Tensor | None = None
    untrained_patches: Tensor | None = None
    loss: LossCurve | None = None
    accuracy: Mapping[str, Mapping[int, float]] | None = None
    chance: float | None = None
    segmented: SegmentedImages | None = None
    nearest: NearestImages | None = None
    names: Sequence[str] | None = None
    labels: Tensor | None = None
    features: Tensor | None = None


def save_figures(data: FigureData, folder: Path, title: str) -> list[Path]:
    """Write one PNG for each figure that there is data for, and all of them together as report.png.

    Returns the files written, the composite first; empty if there is nothing to show.
    """
    panels = _make_panels(data)
    if not panels:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {panel.name: _draw(panel.draw, panel.width, panel.height) for panel in panels}
    heading = partial(_draw_heading, title=make_printable(title))
    # Loss and accuracy share a row; each strip of images has a row of its own.
    curves = [picture for name, picture in drawn.items() if name in CURVES]
    strips = [[picture] for name, picture in drawn.items() if name not in CURVES]
    composite = _stack([[_draw(heading, WIDTH, 0.5)], *([curves] if curves else []), *strips])
    paths = []
    for name, picture in {"report": composite, **drawn}.items():
        paths.append(folder / f"{name}.png")
        with open_atomically(paths[-1]) as file:
            picture.save(file, format="png", dpi=(DPI, DPI))
    return paths


def _draw(draw: Callable[[FigureBase], None], width: float, height: float) -> Image:
    """A figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # slow to import
    from PIL import Image

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    draw(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_heading(figure: FigureBase, title: str) -> None:
    figure.suptitle(title, fontsize=15, fontweight="bold", parse_math=False)


def _stack(rows: Sequence[Sequence[Image]]) -> Image:
    """Rows of pictures, each below the one before, on white."""
    from PIL import Image

    heights = [max(picture.height for picture in row) for row in rows]
    stacked = Image.new("RGB", (max(sum(picture.width for picture in row) for row in rows), sum(heights)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture in row:
            stacked.paste(picture, (left, top))
            left += picture.width
        top += height
    return stacked


@dataclass(frozen=True)
class _Panel:
    """A figure of the composite: its name, its height in inches, and what draws it."""

    name: str
    height: float
    draw: Callable[[FigureBase], None]

    @property
    def width(self) -> float:
        return WIDTH / 2 if self.name in CURVES else WIDTH


def _make_panels(data: FigureData) -> list[_Panel]:
    from dmtjepa.evaluation import drawing

    panels: list[_Panel] = []
    if data.loss is not None and len(data.loss.loss):
        curve = data.loss
        panels.append(_Panel("loss", 3.8, lambda figure: drawing.draw_loss(figure.subplots(), curve.epoch, curve.loss)))
    if data.accuracy:
        draw = partial(drawing.draw_accuracy, accuracy=data.accuracy, chance=data.chance)
        panels.append(_Panel("accuracy", 3.8, lambda figure: draw(figure.subplots())))
    if data.images is not None:
        panels += _make_image_panels(data, data.images)
    if data.segmented is not None:
        num_images, _, height, width = data.segmented.images.shape
        rows = 2 + len(data.segmented.predicted)
        draw_rows = partial(drawing.draw_segmentation_rows, segmented=data.segmented)
        panels.append(_Panel("segmentation", rows * WIDTH / num_images * height / width + 0.6, draw_rows))
    return panels


def _make_image_panels(data: FigureData, images: Tensor) -> list[_Panel]:
    from dmtjepa.evaluation import drawing

    panels: list[_Panel] = []
    height, width = images.shape[-2:]
    strip = WIDTH / len(images) * height / width

    def add(name: str, height: float, draw: Callable[..., None], **shown: Any) -> None:
        panels.append(_Panel(name, height, partial(draw, images=images, grid_size=data.grid_size, **shown)))

    if data.target_index is not None and data.context_index is not None:
        shown = {"context_index": data.context_index, "target_index": data.target_index}
        add("masks", strip + 0.9, drawing.draw_mask_strip, **shown)
    if data.neighbor_index is not None and data.query_index is not None:
        shown = {"query_index": data.query_index, "neighbor_index": data.neighbor_index}
        add("neighbors", strip + 0.9, drawing.draw_neighbor_strip, window=data.window, **shown)
    if data.patches is not None:
        patches = {"trained": data.patches}
        if data.untrained_patches is not None:
            patches["untrained"] = data.untrained_patches
        add("pca", (1 + len(patches)) * strip + 0.6, drawing.draw_pca_rows, patches=patches)
    if data.nearest is not None:
        num_queries, num_nearest = data.nearest.images.shape[:2]
        row = WIDTH / (1 + num_nearest) * height / width + 0.2
        draw_rows = partial(drawing.draw_nearest_rows, images=images, nearest=data.nearest)
        panels.append(_Panel("nearest", num_queries * row + 0.6, draw_rows))
    return panels
