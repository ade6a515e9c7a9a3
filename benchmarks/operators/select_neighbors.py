"""select_neighbors at the shapes of training: 4 of the 8 patches around every covered patch.

Unique bytes: the features of the neighbourhood, the list of covered patches, the output.
"""

from collections.abc import Callable

import torch

from benchmarks.operators.cases import Case
from benchmarks.workloads import Workload
from dmtjepa.kernels.select_neighbors import launch_select_neighbors, select_neighbors_cpu, select_neighbors_plain


def chosen_differently(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of patches whose set of neighbours differs; rounding may swap near-ties at the last rank."""
    chosen, expected = (neighbor_index.sort(dim=1).values for neighbor_index in (output, reference))
    return float((chosen != expected).any(dim=1).float().mean())


def _with_grid(implementation: Callable) -> Callable:
    """An implementation that takes rows and columns, called with the grid size as the public function is."""
    return lambda h, patches, grid_size, *others: implementation(h, patches, *grid_size, *others)


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    masks = workload.masks(0, device=device)
    h = torch.randn(workload.batch_size, workload.num_patches, workload.dim, device=device)
    h = torch.nn.functional.layer_norm(h, (workload.dim,)).to(dtype)

    def reference(h, *arguments):
        return select_neighbors_plain(h.float(), *arguments)

    num_covered, num_neighbors = len(masks.target_unique), 4
    return [
        Case(
            "select_neighbors",
            (h, masks.target_unique, workload.grid_size, num_neighbors, 3, "wrap"),
            _with_grid(launch_select_neighbors),
            _with_grid(select_neighbors_cpu),
            select_neighbors_plain,
            reference,
            len(masks.neighborhood) * workload.dim * dtype.itemsize + num_covered * (8 + 8 * num_neighbors),
            2e-3,
            chosen_differently,
        )
    ]
