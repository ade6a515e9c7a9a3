"""embed_patches at the shapes of training: all patches (the teacher) and the context alone (the student).

Unique bytes: the pixels of the kept patches, the index, the output.
"""

import torch

from benchmarks.operators.cases import Case, Shape, num_bytes, rounding
from dmtjepa.kernels.embed_patches import embed_patches_cpu, embed_patches_plain, launch_embed_patches

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def cases(shape: Shape, device: str, dtype: torch.dtype) -> list[Case]:
    size = (shape.batch_size, 3, shape.image_size, shape.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    context = shape.masks().context_index.to(device)
    channels_last = images.permute(0, 2, 3, 1).contiguous()
    row_size = 3 * shape.patch_size**2

    def plain(images, patch_size, index, mean, std, dtype):
        return embed_patches_plain(images, patch_size, index, mean=mean, std=std, dtype=dtype)

    def reference(images, patch_size, index, mean, std, dtype):
        return embed_patches_plain(images, patch_size, index, mean=mean, std=std)

    def case(name: str, images: torch.Tensor, index: torch.Tensor | None) -> Case:
        num_kept = shape.num_patches if index is None else index.shape[1]
        num_values = shape.batch_size * num_kept * row_size
        return Case(
            f"embed_patches {name}",
            (images, shape.patch_size, index, MEAN, STD, dtype),
            launch_embed_patches,
            embed_patches_cpu,
            plain,
            reference,
            num_values * (1 + dtype.itemsize) + (0 if index is None else num_bytes(index)),
            rounding(dtype),
        )

    return [case("all", images, None), case("context", images, context), case("NHWC context", channels_last, context)]
