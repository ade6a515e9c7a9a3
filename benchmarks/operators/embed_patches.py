"""embed_patches at the shapes of training: all patches (the teacher) and the context alone (the student).

Unique bytes: the pixels of the kept patches, the index, the output.
"""

import torch

from benchmarks.operators.cases import Case, num_bytes, rounding
from benchmarks.workloads import Workload
from dmtjepa.kernels.embed_patches import embed_patches_cpu, embed_patches_plain, launch_embed_patches

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def cases(workload: Workload, device: str, dtype: torch.dtype) -> list[Case]:
    images = workload.images(device)
    context = workload.masks(0, device=device).context_index
    channels_last = images.contiguous(memory_format=torch.channels_last)
    row_size = 3 * workload.patch_size**2

    def plain(images, patch_size, index, mean, std, dtype):
        return embed_patches_plain(images, patch_size, index, mean=mean, std=std, dtype=dtype)

    def reference(images, patch_size, index, mean, std, dtype):
        return embed_patches_plain(images, patch_size, index, mean=mean, std=std)

    def case(name: str, images: torch.Tensor, index: torch.Tensor | None) -> Case:
        num_kept = workload.num_patches if index is None else index.shape[1]
        num_values = workload.batch_size * num_kept * row_size
        return Case(
            f"embed_patches {name}",
            (images, workload.patch_size, index, MEAN, STD, dtype),
            launch_embed_patches,
            embed_patches_cpu,
            plain,
            reference,
            num_values * (1 + dtype.itemsize) + (0 if index is None else num_bytes(index)),
            rounding(dtype),
        )

    return [
        case("all", images, None),
        case("context", images, context),
        case("context, channels last", channels_last, context),
    ]
