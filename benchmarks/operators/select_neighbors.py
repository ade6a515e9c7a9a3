"""select_neighbors at the shapes of training: 4 of the 8 patches around every covered patch.

Unique bytes: the features of the neighbourhood, the list of covered patches, the output.
"""

import torch

from benchmarks.operators.cases import Case, Shape
from dmtjepa.kernels.select_neighbors import launch_select_neighbors, select_neighbors_cpu, select_neighbors_plain


def chosen_differently(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of patches whose set of neighbours differs; rounding may swap near-ties at the last rank."""
    chosen, expected = (neighbor_index.sort(dim=1).values for neighbor_index in (output, reference))
    return float((chosen != expected).any(dim=1).float().mean())


def cases(shape: Shape, device: str, dtype: torch.dtype) -> list[Case]:
    masks = shape.masks().to(device)
    h = torch.randn(shape.batch_size, shape.num_patches, shape.dim, device=device)
    h = torch.nn.functional.layer_norm(h, (shape.dim,)).to(dtype)

    def reference(h, *arguments):
        return select_neighbors_plain(h.float(), *arguments)

    num_covered, num_neighbors = len(masks.target_unique), 4
    return [
        Case(
            "select_neighbors",
            (h, masks.target_unique, shape.grid_size, num_neighbors, 3, "wrap"),
            launch_select_neighbors,
            select_neighbors_cpu,
            select_neighbors_plain,
            reference,
            len(masks.neighborhood) * shape.dim * dtype.itemsize + num_covered * (8 + 8 * num_neighbors),
            2e-3,
            chosen_differently,
        )
    ]
