"""select_neighbors at the shapes of training: 4 of the 8 patches around every covered patch.

Unique bytes: the features of the neighbourhood, the list of covered patches, the outputs.
"""

import torch

from benchmarks.operators.cases import Case, Shape
from dmtjepa.kernels.select_neighbors import launch_select_neighbors, select_neighbors_cpu, select_neighbors_plain


def chosen_differently(output: tuple, reference: tuple) -> float:
    """Share of patches whose set of neighbours differs; rounding may swap near-ties at the last rank."""
    chosen, expected = (pair[0].sort(dim=1).values for pair in (output, reference))
    return float((chosen != expected).any(dim=1).float().mean())


def cases(shape: Shape, device: str, dtype: torch.dtype) -> list[Case]:
    masks = shape.masks().to(device)
    h = torch.randn(shape.batch_size, shape.num_patches, shape.dim, device=device)
    h = torch.nn.functional.layer_norm(h, (shape.dim,)).to(dtype)

    def plain(h, patches, rows, cols, num_neighbors, window, border):
        return select_neighbors_plain(h, patches, (rows, cols), num_neighbors, window, border)

    def reference(h, *arguments):
        return plain(h.float(), *arguments)

    num_covered, num_neighbors = len(masks.target_unique), 4
    return [
        Case(
            "select_neighbors",
            (h, masks.target_unique, *shape.grid_size, num_neighbors, 3, "wrap"),
            launch_select_neighbors,
            select_neighbors_cpu,
            plain,
            reference,
            len(masks.neighborhood) * shape.dim * dtype.itemsize + num_covered * (8 + 8 * num_neighbors + 4),
            2e-3,
            chosen_differently,
        )
    ]
