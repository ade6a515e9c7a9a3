"""Drawing into matplotlib axes: loss, accuracy, masks, neighbours, principal components, nearest images, segmentation.

Every `draw_*` function draws into the axes or the figure that it is given; nothing is written to disk here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from dmtjepa.evaluation.formatting import WITH_LAYOUT
from dmtjepa.evaluation.retrieval import NearestImages
from dmtjepa.evaluation.segmentation import VOID, SegmentedImages

CONTEXT_COLOR = "#2b6cb0"
BLOCK_COLORS = ("#e8590c", "#2f9e44", "#c2255c", "#f2b705", "#7048e8", "#0c8599")
QUERY_COLORS = ("#ffd43b", "#ff6b6b", "#69db7c", "#74c0fc", "#f783ac")
BAR_COLORS = {
    "trained": "#2b6cb0",
    "student": "#90cdf4",
    "start": "#e9b872",
    "untrained": "#adb5bd",
    "pixels": "#dee2e6",
}
RIGHT_COLOR, WRONG_COLOR = "#2f9e44", "#e03131"
SMOOTHING = 0.02
"""The smoothed loss averages over this share of the run; over at least 5 steps if the run has 25."""
ARROW = {"arrowstyle": "-|>", "color": "#212529", "shrinkA": 0, "shrinkB": 0}


def draw_loss(axes: Axes, epoch: np.ndarray, loss: np.ndarray) -> None:
    """Loss of every logged step and its running mean; both arrays are [n], n at least 1."""
    axes.plot(epoch, loss, color="#a5c8ec", linewidth=0.8, label="step")
    width = max(5, round(SMOOTHING * len(loss))) if len(loss) >= 25 else 1
    if width > 1:
        # "valid" leaves out the ends, where the window reaches beyond the run.
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        start = (width - 1) // 2
        axes.plot(
            epoch[start : start + len(smooth)],
            smooth,
            color="#1c4e80",
            linewidth=1.8,
            label=f"mean of {width} steps",
        )
    finite = loss[np.isfinite(loss)]
    if len(finite):
        # The first losses are much larger than the rest: they may leave the axes.
        low, high = np.quantile(finite, [0.0, 0.995])
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
    axes.set(title="Training loss", xlabel="epoch", ylabel="loss")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def draw_accuracy(axes: Axes, accuracy: Mapping[str, Mapping[int, float]], chance: float | None) -> None:
    """Bars of k-NN accuracy: one group per k, one bar per kind of features, hatched for those with layout.

    accuracy: name of the features, those with layout ending in `WITH_LAYOUT` -> {k: accuracy from 0 to 1}. chance:
        share of the most frequent class, 0 to 1.
    """
    ks = list(next(iter(accuracy.values())))
    width = 0.8 / len(accuracy)
    for i, (name, values) in enumerate(accuracy.items()):
        heights = [100 * values[k] for k in ks]
        positions = np.arange(len(ks)) + (i - (len(accuracy) - 1) / 2) * width
        bars = axes.bar(
            positions, heights, width, label=name, color=BAR_COLORS.get(name.removesuffix(WITH_LAYOUT)),
            hatch="///" if name.endswith(WITH_LAYOUT) else None, edgecolor="#495057", linewidth=0.5,
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.1f", fontsize=8 if len(accuracy) * len(ks) <= 15 else 6, padding=1)
    if chance is not None:
        axes.axhline(100 * chance, color="#868e96", linestyle=":", linewidth=1.2, label="most frequent class")
    axes.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
    top = max(max(values.values()) for values in accuracy.values())
    axes.set(title="k-NN accuracy (%)", ylim=(0, 130 * max(top, chance or 0) + 1))  # with space for the legend
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.legend(frameon=False, fontsize=8, ncols=2 if len(accuracy) <= 5 else 4, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


def to_colors(image: Tensor) -> np.ndarray:
    """An image uint8 [C,H,W] as RGB [H,W,3]: its first three channels, or its first one in grey if it has fewer."""
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()


def draw_image(axes: Axes, image: Tensor) -> None:
    """A uint8 image [C,H,W], without ticks."""
    axes.imshow(to_colors(image), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_masks(
    axes: Axes, image: Tensor, context_index: Tensor, target_index: Tensor, grid_size: tuple[int, int]
) -> None:
    """An image uint8 [3,H,W]: context patches [C] tinted, target blocks [M,T] outlined, everything else pale."""
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
        # A small inset keeps the borders of blocks with a common edge apart.
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
    """An image uint8 [3,H,W] with query patches [Q] filled, their windows dotted, and arrows to their neighbours [Q,K].

    A wider arrow leads to a more similar neighbour. A window that wraps around the grid has no frame.
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

    [B,N,D] -> float64 [B,rows,columns,3] from 0 to 1. The components are computed over the patches of all images, so
    that a colour means the same in each image. Each component is scaled from its 2nd to its 98th percentile.
    """
    batch, _, width = patches.shape
    flat = patches.reshape(-1, width).double()
    flat = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    vectors = vectors[:, -3:].flip(1)
    # The sign of an eigenvector is arbitrary. A positive largest entry makes the figure reproducible.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    components = (flat @ vectors).numpy()
    low, high = np.quantile(components, [0.02, 0.98], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return scaled.clip(0, 1).reshape(batch, *grid_size, 3)


def draw_pca(axes: Axes, colors: np.ndarray, image_size: tuple[int, int]) -> None:
    """Colours [rows,columns,3] of patches, stretched to the size of the image."""
    height, width = image_size
    axes.imshow(colors, interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks([])


def draw_mask_strip(
    figure: FigureBase,
    images: Tensor,
    context_index: Sequence[Tensor],
    target_index: Tensor,
    grid_size: tuple[int, int],
) -> None:
    """A row of images [B,3,H,W] with their context patches ([C] each) and target blocks [B,M,T], and a legend."""
    figure.suptitle("Masks: what the student sees, and the blocks whose targets it predicts", fontsize=12)
    for b, axes in enumerate(_add_row(figure, len(images))):
        draw_masks(axes, images[b], context_index[b], target_index[b], grid_size)
    sizes = sorted({len(index) for index in context_index})
    shown = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    handles = [Patch(facecolor=CONTEXT_COLOR, alpha=0.4, label=f"context ({shown} patches)")]
    _, num_blocks, block_size = target_index.shape
    for m in range(num_blocks):
        color = BLOCK_COLORS[m % len(BLOCK_COLORS)]
        label = f"target {m + 1} ({block_size} patches)"
        handles.append(Patch(facecolor=f"{color}26", edgecolor=color, linewidth=2, label=label))
    handles.append(Patch(facecolor="#f1f3f5", edgecolor="#ced4da", label="unused"))
    _add_legend(figure, handles)


def draw_neighbor_strip(
    figure: FigureBase,
    images: Tensor,
    query_index: Tensor,
    neighbor_index: Tensor,
    grid_size: tuple[int, int],
    window: int,
) -> None:
    """A row of images [B,3,H,W] with query patches [Q] and their neighbours [B,Q,K], and a legend."""
    figure.suptitle(
        f"Neighbours: the {neighbor_index.shape[2]} patches of a {window}x{window} window most similar to its centre, "
        f"for the trained teacher",
        fontsize=12,
    )
    for b, axes in enumerate(_add_row(figure, len(images))):
        draw_neighbors(axes, images[b], query_index, neighbor_index[b], grid_size, window)
    handles = [
        Patch(facecolor=QUERY_COLORS[0], edgecolor="#212529", linewidth=1.6, label="patch"),
        Patch(facecolor=QUERY_COLORS[0], edgecolor="#343a40", alpha=0.55, label="selected neighbour"),
        Line2D([], [], color="#212529", linewidth=2, label="to a neighbour; wider means more similar"),
        Patch(fill=False, edgecolor="#343a40", linestyle=":", label="window"),
    ]
    _add_legend(figure, handles)


def draw_pca_rows(
    figure: FigureBase, images: Tensor, patches: Mapping[str, Tensor], grid_size: tuple[int, int]
) -> None:
    """Images [B,3,H,W] in a row, and a row of principal components for each name of `patches` (float [B,N,D])."""
    figure.suptitle(
        "Patch features minus their mean at each position: principal components 1 to 3 as red, green and blue",
        fontsize=12,
    )
    height, width = images.shape[-2:]
    grid = figure.subplots(1 + len(patches), len(images), squeeze=False)
    grid[0, 0].set_ylabel("image", fontsize=11)
    for axes, image in zip(grid[0], images, strict=True):
        draw_image(axes, image)
    for row, (name, features) in zip(grid[1:], patches.items(), strict=True):
        row[0].set_ylabel(name, fontsize=11)
        for axes, colors in zip(row, pca_colors(features, grid_size), strict=True):
            draw_pca(axes, colors, (height, width))


def draw_nearest_rows(figure: FigureBase, images: Tensor, nearest: NearestImages) -> None:
    """A row for each image [B,3,H,W]: the image and its nearest ones; with labels, a frame tells who has its class."""
    figure.suptitle(
        "Nearest images by the pooled features of the trained teacher, the most similar first"
        + (": green frames have the same class" if nearest.classes is not None else ""),
        fontsize=12,
    )
    grid = figure.subplots(len(images), 1 + nearest.images.shape[1], squeeze=False)
    for b, row in enumerate(grid):
        draw_image(row[0], images[b])
        row[0].set_title("image" if nearest.query_classes is None else _shorten(nearest.query_classes[b]), fontsize=8)
        for k, axes in enumerate(row[1:]):
            draw_image(axes, nearest.images[b, k])
            if nearest.classes is None or nearest.query_classes is None:
                axes.set_title(f"{nearest.similarity[b, k]:.2f}", fontsize=8)
                continue
            same = nearest.classes[b][k] == nearest.query_classes[b]
            axes.set_title(_shorten(nearest.classes[b][k]), fontsize=8)
            axes.spines[:].set(color=RIGHT_COLOR if same else WRONG_COLOR, linewidth=2.5)


def draw_segmentation_rows(figure: FigureBase, segmented: SegmentedImages) -> None:
    """Images in a row, their masks, and a row of predicted patches for each kind of features."""
    figure.suptitle("Segmentation by a linear probe of patches: a colour for each class, black is void", fontsize=12)
    height, width = segmented.images.shape[-2:]
    grid = figure.subplots(2 + len(segmented.predicted), len(segmented.images), squeeze=False)
    for axes, image in zip(grid[0], segmented.images, strict=True):
        draw_image(axes, image)
    rows = {"mask": segmented.masks, **segmented.predicted}
    for name, row in zip(("image", *rows), grid, strict=True):
        row[0].set_ylabel(name, fontsize=11)
    for row, classes in zip(grid[1:], rows.values(), strict=True):
        for axes, labels in zip(row, classes, strict=True):
            draw_pca(axes, color_classes(labels), (height, width))


def color_classes(labels: Tensor) -> np.ndarray:
    """Colours uint8 [H,W,3] of class numbers, integers [H,W]: 0, the background, is pale, and 255, void, black."""
    from matplotlib import colormaps

    palette = np.array(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    numbers = labels.numpy().astype(int)
    colors = (255 * palette[(numbers - 1) % len(palette)]).round().astype(np.uint8)
    colors[numbers == 0] = 233
    colors[numbers == VOID] = 0
    return colors


def _shorten(name: str) -> str:
    # A dollar sign would begin a formula.
    return (name if len(name) <= 18 else f"{name[:17]}…").replace("$", r"\$")


def _add_row(figure: FigureBase, count: int) -> Sequence[Axes]:
    return figure.subplots(1, count, squeeze=False)[0]


def _add_legend(figure: FigureBase, handles: Sequence[Artist]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


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
