"""The figures of a report as small pictures without text: titles, legends and captions are part of the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from dmtjepa.evaluation.figures import FigureData

SIDE = 320
"""Longest side of a drawn picture in pixels."""
SMALL = 128
"""Images of at most so many pixels a side are kept as they are; the browser enlarges them without smoothing."""

NUM_NEAREST = 5
"""Nearest images of an image that fit beside it."""


@dataclass(frozen=True)
class Picture:
    """An image as a data URI. `alt` says what it shows, `caption` stands below it; `tone` colours the caption."""

    uri: str
    alt: str
    caption: str = ""
    tone: str = ""
    pixelated: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a colour as in CSS, and how it fills its square (`fill`, `frame` or `dotted`)."""

    color: str
    label: str
    kind: str = "fill"


@dataclass(frozen=True)
class Gallery:
    """A figure: groups of pictures that belong together, such as an image and what is made of it."""

    name: str
    title: str
    text: str
    groups: list[list[Picture]]
    legend: list[Key] = field(default_factory=list)
    wide: bool = False


def make_galleries(data: FigureData) -> list[Gallery]:
    """The galleries that there is data for."""
    found = []
    if data.images is not None:
        found += [make(data, data.images) for make in (_show_masks, _show_neighbors, _show_components, _show_nearest)]
    found.append(_show_segmentation(data))
    return [gallery for gallery in found if gallery is not None]


def _show_masks(data: FigureData, images: Tensor) -> Gallery | None:
    from dmtjepa.evaluation import drawing  # slow to import, as matplotlib is

    context, target = data.context_index, data.target_index
    if context is None or target is None:
        return None
    pictures = [
        _draw(lambda axes, b=b: drawing.draw_masks(axes, images[b], context[b], target[b], data.grid_size), images)
        for b in range(len(images))
    ]
    sizes = sorted({len(index) for index in context})
    shown = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    legend = [Key(drawing.CONTEXT_COLOR, f"context, {shown} patches")]
    for m in range(target.shape[1]):
        color = drawing.BLOCK_COLORS[m % len(drawing.BLOCK_COLORS)]
        legend.append(Key(color, f"target {m + 1}, {target.shape[2]} patches", "frame"))
    groups = [[Picture(uri, f"masks of image {b + 1}")] for b, uri in enumerate(pictures)]
    text = "What the student sees, and the blocks whose targets it predicts."
    return Gallery("masks", "Masks", text, groups, legend)


def _show_neighbors(data: FigureData, images: Tensor) -> Gallery | None:
    from dmtjepa.evaluation import drawing

    queries, neighbors = data.query_index, data.neighbor_index
    if queries is None or neighbors is None:
        return None
    pictures = [
        _draw(
            lambda axes, b=b: drawing.draw_neighbors(
                axes, images[b], queries, neighbors[b], data.grid_size, data.window
            ),
            images,
        )
        for b in range(len(images))
    ]
    text = (
        f"The {neighbors.shape[2]} patches of a {data.window}x{data.window} window that are most similar to its "
        "centre, for the trained teacher. A wider arrow leads to a more similar patch."
    )
    color = drawing.QUERY_COLORS[0]
    legend = [Key(color, "patch"), Key(f"{color}8c", "neighbour"), Key("currentColor", "window", "dotted")]
    groups = [[Picture(uri, f"neighbours in image {b + 1}")] for b, uri in enumerate(pictures)]
    return Gallery("neighbors", "Neighbours", text, groups, legend)


def _show_components(data: FigureData, images: Tensor) -> Gallery | None:
    from dmtjepa.evaluation.drawing import pca_colors

    if data.patches is None:
        return None
    columns = [[show_image(image, f"image {b + 1}", "image")] for b, image in enumerate(images)]
    for name, patches in (("trained", data.patches), ("untrained", data.untrained_patches)):
        if patches is not None:
            for b, colors in enumerate(pca_colors(patches, data.grid_size)):
                uri = _encode((255 * colors).round().astype(np.uint8), lossless=True)
                columns[b].append(Picture(uri, f"components of image {b + 1}, {name}", name, pixelated=True))
    text = (
        "Patch features minus their mean at each position: principal components 1 to 3 as red, green and blue, the "
        "same for all images."
    )
    return Gallery("pca", "Principal components of patch features", text, columns)


def _show_nearest(data: FigureData, images: Tensor) -> Gallery | None:
    nearest = data.nearest
    if nearest is None:
        return None
    groups = []
    for b, image in enumerate(images):
        own = nearest.query_classes[b] if nearest.query_classes is not None else None
        group = [show_image(image, f"image {b + 1}", own or "image")]
        for k in range(min(NUM_NEAREST, nearest.images.shape[1])):
            caption, tone = f"{nearest.similarity[b, k]:.2f}", ""
            if nearest.classes is not None:
                caption = nearest.classes[b][k]
                tone = "good" if caption == own else "bad"
            group.append(show_image(nearest.images[b, k], f"nearest image {k + 1} of image {b + 1}", caption, tone))
        groups.append(group)
    text = (
        "By the pooled features of the trained teacher, the most similar first. "
        + ("A green name is the class of the image at the left." if nearest.classes is not None else "With the cosine.")
    )  # fmt: skip
    return Gallery("nearest", "Nearest images", text, groups, wide=True)


def _show_segmentation(data: FigureData) -> Gallery | None:
    from dmtjepa.evaluation.drawing import color_classes

    segmented = data.segmented
    if segmented is None:
        return None
    groups = []
    for b, image in enumerate(segmented.images):
        group = [show_image(image, f"segmented image {b + 1}", "image")]
        for name, classes in {"mask": segmented.masks, **segmented.predicted}.items():
            uri = _encode(color_classes(classes[b]), lossless=True)
            group.append(Picture(uri, f"{name} of image {b + 1}", name, pixelated=True))
        groups.append(group)
    text = (
        "The class of each patch, by a linear probe: a colour for each class, pale for the background, black for void."
    )
    return Gallery("segmentation", "Segmentation", text, groups)


def show_image(image: Tensor, alt: str, caption: str = "", tone: str = "") -> Picture:
    """An image uint8 [C,H,W], see `to_colors`."""
    from dmtjepa.evaluation.drawing import to_colors

    pixels = to_colors(image)
    small = max(pixels.shape[:2]) <= SMALL
    return Picture(_encode(pixels, lossless=small), alt, caption, tone, pixelated=small)


def _draw(draw: Callable[..., None], images: Tensor) -> str:
    """Draw into axes of the shape of the images, without a margin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = (SIDE * side / max(images.shape[-2:]) for side in images.shape[-2:])
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    draw(axes)
    axes.set_axis_off()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _encode(np.asarray(canvas.buffer_rgba())[..., :3], lossless=False)


def _encode(pixels: np.ndarray, *, lossless: bool) -> str:
    """A data URI of pixels uint8 [H,W,3]."""
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if lossless:
        image.save(file, "png")
    else:
        image.save(file, "jpeg", quality=88, subsampling=0)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
