"""Pictures of a run: loss curve, accuracies, masks, chosen neighbours, principal components of patch features.

Every `draw_*` function draws into axes that it is given; `save_pictures` arranges them into single files and one
composite, `report.png`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

CONTEXT_COLOR = "#2b6cb0"
BLOCK_COLORS = ("#e8590c", "#2f9e44", "#c2255c", "#f2b705", "#7048e8", "#0c8599")
QUERY_COLORS = ("#ffd43b", "#ff6b6b", "#69db7c", "#74c0fc", "#f783ac")
BAR_COLORS = {"trained": "#2b6cb0", "untrained": "#adb5bd", "pixels": "#dee2e6"}
SMOOTHING = 0.02
"""Share of the run over which the smoothed loss averages; at least 5 steps, of a run that has 25."""
WIDTH = 15.0
"""Of the composite, in inches."""
DPI = 110
ARROW = {"arrowstyle": "-|>", "color": "#212529", "shrinkA": 0, "shrinkB": 0}


@dataclass(frozen=True)
class LossCurve:
    """Losses of a run: epoch as a real number (1.5 is half way through the second epoch) and loss, both [n]."""

    epoch: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class PictureData:
    """What the pictures show. Arrays are on the CPU; parts that are None are left out.

    images: uint8 [B,3,H,W]. grid_size: rows and columns of patches, N in all.
    context_index [C] of each image, target_index [B,M,T]: patches of the masks.
    query_index [Q]: patches whose neighbours are shown; neighbor_index [B,Q,K]: most similar first, -1 when missing.
    patches, untrained_patches: float [B,N,D], features for the principal components, less their mean at each place.
    accuracy: name of the features -> {k: share}; `chance` the share of the most frequent class.
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


def read_losses(path: Path) -> LossCurve:
    """Read the losses from a run's CSV, whose header is epoch,itr,loss,mask-A,mask-B,time (ms).

    Raises:
        ValueError: a column is missing.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"epoch", "itr", "loss"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}; its header is {reader.fieldnames}")
        rows = [(row["epoch"], row["itr"], row["loss"]) for row in reader]
    # A run that was killed may leave a last line cut short, a resumed one a second header.
    numbers = np.array([[float(value) for value in row] for row in rows if all(map(_is_number, row))]).reshape(-1, 3)
    epoch, step, loss = numbers.T
    steps_per_epoch = step.max() + 1 if len(step) else 1
    first = epoch.min() if len(epoch) else 0
    return LossCurve(epoch - first + step / steps_per_epoch, loss)


def draw_loss(axes: Axes, curve: LossCurve) -> None:
    """Loss of every logged step, and its running mean."""
    axes.plot(curve.epoch, curve.loss, color="#a5c8ec", linewidth=0.8, label="step")
    width = max(5, round(SMOOTHING * len(curve.loss))) if len(curve.loss) >= 25 else 1
    if width > 1:
        # "valid" leaves out the ends, where a window reaching beyond the run would pull the mean down.
        smooth = np.convolve(curve.loss, np.ones(width) / width, mode="valid")
        start = (width - 1) // 2
        axes.plot(
            curve.epoch[start : start + len(smooth)],
            smooth,
            color="#1c4e80",
            linewidth=1.8,
            label=f"mean of {width} steps",
        )
    finite = curve.loss[np.isfinite(curve.loss)]
    if len(finite):
        # The first steps tower over the rest: show the bulk and let them leave the picture.
        low, high = np.quantile(finite, [0.0, 0.995])
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.set(title="Training loss", xlabel="epoch", ylabel="loss")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def draw_accuracy(axes: Axes, accuracy: Mapping[str, Mapping[int, float]], chance: float | None) -> None:
    """Bars of k-NN accuracy: a group for every k, a bar for every kind of features."""
    ks = list(next(iter(accuracy.values())))
    width = 0.8 / len(accuracy)
    for i, (name, values) in enumerate(accuracy.items()):
        heights = [100 * values[k] for k in ks]
        places = np.arange(len(ks)) + (i - (len(accuracy) - 1) / 2) * width
        bars = axes.bar(
            places, heights, width, label=name, color=BAR_COLORS.get(name), edgecolor="#495057", linewidth=0.5
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    if chance is not None:
        axes.axhline(100 * chance, color="#868e96", linestyle=":", linewidth=1.2, label="most frequent class")
    axes.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
    top = max(max(values.values()) for values in accuracy.values())
    axes.set(title="k-NN accuracy (%)", ylim=(0, min(108, 130 * max(top, chance or 0) + 1)))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


def draw_image(axes: Axes, image: Tensor) -> None:
    """A uint8 image [3,H,W], without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_masks(
    axes: Axes, image: Tensor, context_index: Tensor, target_index: Tensor, grid_size: tuple[int, int]
) -> None:
    """An image [3,H,W]: context patches [C] bright and tinted, target blocks [M,T] outlined, the rest pale."""
    rows, columns = grid_size
    patch = (image.shape[1] / rows, image.shape[2] / columns)
    context = torch.zeros(rows * columns, dtype=torch.bool)
    context[context_index] = True
    inside = _to_pixels(context.view(rows, columns), image.shape[1:])
    shown = torch.where(inside, image.float(), 0.25 * image.float() + 0.75 * 245)
    draw_image(axes, shown.round().clamp(0, 255).byte())
    for index in context_index.tolist():
        axes.add_patch(_square(index, grid_size, patch, facecolor=CONTEXT_COLOR, alpha=0.22, linewidth=0))
    for m, block in enumerate(target_index):
        color = BLOCK_COLORS[m % len(BLOCK_COLORS)]
        for index in block.tolist():
            axes.add_patch(_square(index, grid_size, patch, facecolor=color, alpha=0.15, linewidth=0))
        r, c = block // columns, block % columns
        corner = (c.min().item() * patch[1] - 0.5, r.min().item() * patch[0] - 0.5)
        size = ((c.max() - c.min() + 1).item() * patch[1], (r.max() - r.min() + 1).item() * patch[0])
        # Nested a little, so that the borders of blocks with a common edge stay apart.
        inset = 0.06 * (m + 1) * min(patch)
        axes.add_patch(
            Rectangle(
                (corner[0] + inset, corner[1] + inset),
                size[0] - 2 * inset,
                size[1] - 2 * inset,
                fill=False,
                edgecolor=color,
                linewidth=2,
            )
        )


def draw_neighbors(
    axes: Axes,
    image: Tensor,
    query_index: Tensor,
    neighbor_index: Tensor,
    grid_size: tuple[int, int],
    window: int,
) -> None:
    """An image [3,H,W] with query patches [Q] filled, their windows dotted, and arrows to their neighbours [Q,K].

    A wider arrow leads to a more similar neighbour. Where a window goes round the grid its frame is left out.
    """
    rows, columns = grid_size
    patch = (image.shape[1] / rows, image.shape[2] / columns)
    pale = (0.6 * image.float() + 0.4 * 255).round().byte()
    draw_image(axes, pale)
    for q, (query, neighbors) in enumerate(zip(query_index.tolist(), neighbor_index.tolist(), strict=True)):
        color = QUERY_COLORS[q % len(QUERY_COLORS)]
        row, column = divmod(query, columns)
        reach = window // 2
        if reach <= row < rows - reach and reach <= column < columns - reach:
            corner = ((column - reach) * patch[1] - 0.5, (row - reach) * patch[0] - 0.5)
            size = (window * patch[1], window * patch[0])
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#343a40", linestyle=":", linewidth=1))
        for rank, neighbor in enumerate(n for n in neighbors if n >= 0):
            axes.add_patch(_square(neighbor, grid_size, patch, facecolor=color, alpha=0.55, edgecolor="#343a40"))
            axes.annotate(
                "",
                xy=_center(neighbor, columns, patch),
                xytext=_center(query, columns, patch),
                arrowprops={**ARROW, "linewidth": max(0.6, 2.2 - 0.5 * rank)},
                zorder=4,
            )
        axes.add_patch(_square(query, grid_size, patch, facecolor=color, edgecolor="#212529", linewidth=1.6, zorder=3))


def pca_colors(patches: Tensor, grid_size: tuple[int, int]) -> np.ndarray:
    """First three principal components of patch features as red, green and blue.

    [B,N,D] -> float [B,rows,columns,3] in 0 to 1. The components are of all patches of all images together, so that a
    colour means the same in every image; each is scaled from its 2nd to its 98th percentile.
    """
    batch, _, width = patches.shape
    flat = patches.reshape(-1, width).double()
    flat = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    vectors = vectors[:, -3:].flip(1)
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that a picture can be drawn again.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    components = (flat @ vectors).numpy()
    low, high = np.quantile(components, [0.02, 0.98], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return scaled.clip(0, 1).reshape(batch, *grid_size, 3)


def draw_pca(axes: Axes, colors: np.ndarray, image_size: tuple[int, int]) -> None:
    """Colours [rows,columns,3] of patches, stretched to the image's shape."""
    height, width = image_size
    axes.imshow(colors, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks([])


def pick_queries(grid_size: tuple[int, int]) -> Tensor:
    """Patches [Q] to show neighbours of: the middle of every quadrant, and the centre where there is room for it."""
    rows, columns = grid_size
    places = [(r * rows // 4, c * columns // 4) for r in (1, 3) for c in (1, 3)]
    if min(grid_size) >= 12:
        places.append((rows // 2, columns // 2))
    return torch.tensor([row * columns + column for row, column in places])


def save_pictures(data: PictureData, folder: Path, title: str) -> list[Path]:
    """Write the pictures there is data for, one PNG each, and all of them together as report.png.

    Returns the files written, the composite first; empty where there is nothing to show.
    """
    panels = _panels(data)
    if not panels:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    # Loss and accuracy share a row, every strip of images has its own.
    curves = [panel for panel in panels if panel.name in ("loss", "accuracy")]
    rows = ([curves] if curves else []) + [[panel] for panel in panels if panel not in curves]
    heights = [max(panel.height for panel in row) for row in rows]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    for row, strip in zip(rows, np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=heights)), strict=True):
        for panel, part in zip(row, np.atleast_1d(strip.subfigures(1, len(row))), strict=True):
            panel.draw(part)
    paths = [folder / "report.png"]
    figure.savefig(paths[0], dpi=DPI)
    for panel in panels:
        figure = Figure(figsize=(WIDTH if panel not in curves else 0.55 * WIDTH, panel.height), layout="constrained")
        panel.draw(figure)
        paths.append(folder / f"{panel.name}.png")
        figure.savefig(paths[-1], dpi=DPI)
    return paths


@dataclass(frozen=True)
class _Panel:
    """A part of the composite: its name, its height in inches, and what draws it into a (sub)figure."""

    name: str
    height: float
    draw: Callable[[FigureBase], None]


def _panels(data: PictureData) -> list[_Panel]:
    panels: list[_Panel] = []
    if data.loss is not None and len(data.loss.loss):
        panels.append(_Panel("loss", 3.8, lambda figure: draw_loss(figure.subplots(), data.loss)))
    if data.accuracy:
        draw = partial(draw_accuracy, accuracy=data.accuracy, chance=data.chance)
        panels.append(_Panel("accuracy", 3.8, lambda figure: draw(figure.subplots())))
    if data.images is None:
        return panels
    height, width = data.images.shape[-2:]
    strip = WIDTH / len(data.images) * height / width
    if data.target_index is not None:
        panels.append(_Panel("masks", strip + 0.9, partial(_draw_mask_strip, data=data)))
    if data.neighbor_index is not None:
        panels.append(_Panel("neighbors", strip + 0.9, partial(_draw_neighbor_strip, data=data)))
    if data.patches is not None:
        num_rows = 2 + (data.untrained_patches is not None)
        panels.append(_Panel("pca", num_rows * strip + 0.6, partial(_draw_pca_rows, data=data)))
    return panels


def _draw_mask_strip(figure: FigureBase, data: PictureData) -> None:
    figure.suptitle("Masks: what the student sees, and the blocks whose targets it predicts", fontsize=12)
    for b, axes in enumerate(_strip(figure, len(data.images))):
        draw_masks(axes, data.images[b], data.context_index[b], data.target_index[b], data.grid_size)
    sizes = sorted({len(index) for index in data.context_index})
    shown = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    handles = [Patch(facecolor=CONTEXT_COLOR, alpha=0.4, label=f"context ({shown} patches)")]
    size = data.target_index.shape[2]
    for m in range(data.target_index.shape[1]):
        color = BLOCK_COLORS[m % len(BLOCK_COLORS)]
        handles.append(
            Patch(facecolor=f"{color}26", edgecolor=color, linewidth=2, label=f"target {m + 1} ({size} patches)")
        )
    handles.append(Patch(facecolor="#f1f3f5", edgecolor="#ced4da", label="unused"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _draw_neighbor_strip(figure: FigureBase, data: PictureData) -> None:
    num_neighbors = data.neighbor_index.shape[2]
    figure.suptitle(
        f"Neighbours: the {num_neighbors} patches of a {data.window}x{data.window} window most similar to its middle, "
        f"for the trained teacher",
        fontsize=12,
    )
    for b, axes in enumerate(_strip(figure, len(data.images))):
        draw_neighbors(axes, data.images[b], data.query_index, data.neighbor_index[b], data.grid_size, data.window)
    handles = [
        Patch(facecolor=QUERY_COLORS[0], edgecolor="#212529", linewidth=1.6, label="patch"),
        Patch(facecolor=QUERY_COLORS[0], edgecolor="#343a40", alpha=0.55, label="chosen neighbour"),
        Line2D([], [], color="#212529", linewidth=2, label="to a neighbour: the wider, the more similar"),
        Patch(fill=False, edgecolor="#343a40", linestyle=":", label="window"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _draw_pca_rows(figure: FigureBase, data: PictureData) -> None:
    figure.suptitle(
        "Patch features less their mean at each place: principal components 1 to 3 as red, green and blue", fontsize=12
    )
    size = tuple(data.images.shape[-2:])
    rows = [("image", None), ("trained", pca_colors(data.patches, data.grid_size))]
    if data.untrained_patches is not None:
        rows.append(("untrained", pca_colors(data.untrained_patches, data.grid_size)))
    grid = figure.subplots(len(rows), len(data.images), squeeze=False)
    for line, (label, colors) in zip(grid, rows, strict=True):
        line[0].set_ylabel(label, fontsize=11)
        for b, axes in enumerate(line):
            if colors is None:
                draw_image(axes, data.images[b])
            else:
                draw_pca(axes, colors[b], size)


def _strip(figure: FigureBase, count: int) -> Sequence[Axes]:
    return figure.subplots(1, count, squeeze=False)[0]


def _square(index: int, grid_size: tuple[int, int], patch: tuple[float, float], **style: Any) -> Rectangle:
    """The rectangle of a patch; `patch` is its height and width in pixels, whose centres have integer coordinates."""
    row, column = divmod(index, grid_size[1])
    return Rectangle((column * patch[1] - 0.5, row * patch[0] - 0.5), patch[1], patch[0], **style)


def _center(index: int, columns: int, patch: tuple[float, float]) -> tuple[float, float]:
    row, column = divmod(index, columns)
    return (column + 0.5) * patch[1] - 0.5, (row + 0.5) * patch[0] - 0.5


def _to_pixels(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Patch mask [rows,columns] -> pixel mask [H,W]."""
    return F.interpolate(mask[None, None].float(), size=tuple(size), mode="nearest")[0, 0] > 0.5


def _is_number(text: str | None) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True
