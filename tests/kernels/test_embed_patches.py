"""embed_patches: every implementation against the reference, and against the patch embedding as a convolution."""

import pytest
import torch

from dmtjepa.kernels import embed_patches, plain
from dmtjepa.kernels.embed_patches import embed_patches_op, embed_patches_reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [  # B, H, W, patch size, kept patches (None: all)
    (1, 4, 4, 4, 1),
    (2, 12, 20, 4, 7),
    (2, 28, 42, 14, 5),
    (2, 32, 48, 16, None),
    (3, 16, 16, 8, 0),
    (1, 40, 80, 40, 2),  # a channel of a patch is larger than a tile
    (2, 9, 15, 3, 4),
]


def draw(shape, device, index_dtype=torch.int64):
    num_images, height, width, patch_size, num_kept = shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, height, width), dtype=torch.uint8, generator=generator)
    num_patches = height // patch_size * (width // patch_size)
    index = torch.rand(num_images, num_patches, generator=generator).argsort(1)[:, :num_kept]
    return images.to(device), patch_size, None if num_kept is None else index.to(device, index_dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_reference(device, shape, layout, dtype):
    images, patch_size, index = draw(shape, device, torch.int32 if layout == "channels_last" else torch.int64)
    reference = embed_patches_reference(images, patch_size, index, mean=MEAN, std=STD, dtype=torch.float32)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    output = embed_patches(images, patch_size, index, mean=MEAN, std=STD, dtype=dtype)
    assert output.dtype == dtype
    # Values reach 2.7; Triton's interpreter cuts bfloat16 off where the others round to nearest.
    rtol = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), reference, rtol=rtol, atol=1e-6)


def test_is_the_patch_embedding(device):
    images, patch_size, index = draw((2, 28, 42, 14, 5), device)
    conv = torch.nn.Conv2d(3, 8, patch_size, patch_size, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    expected = conv((images.cpu().double() / 255 - mean) / std).flatten(2).transpose(1, 2)
    expected = expected.gather(1, index.cpu()[:, :, None].expand(-1, -1, 8))
    patches = embed_patches(images, patch_size, index, mean=MEAN, std=STD).cpu().double()
    torch.testing.assert_close(patches @ conv.weight.flatten(1).T + conv.bias, expected, rtol=1e-5, atol=1e-5)


def test_cropped_images(device):
    images, patch_size, index = draw((2, 32, 48, 16, 3), device)
    crop = images[:, :, :, 16:]
    index = index % 4
    output = embed_patches(crop, patch_size, index, mean=MEAN, std=STD)
    expected = embed_patches_reference(crop, patch_size, index, mean=MEAN, std=STD)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


def test_float64_on_the_cpu():
    images, patch_size, index = draw((2, 12, 20, 4, 7), "cpu")
    for function in (embed_patches, plain.embed_patches):
        output = function(images, patch_size, index, mean=MEAN, std=STD, dtype=torch.float64)
        expected = embed_patches_reference(images, patch_size, index, mean=MEAN, std=STD, dtype=torch.float64)
        torch.testing.assert_close(output, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.slow
def test_opcheck(device):
    images, patch_size, index = draw((2, 12, 20, 4, 7), device)
    torch.library.opcheck(embed_patches_op, (images, patch_size, index, list(MEAN), list(STD), torch.bfloat16))
    images = images.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(embed_patches_op, (images, patch_size, None, list(MEAN), list(STD), torch.float32))


@pytest.mark.slow
def test_fullgraph(device):
    images, patch_size, index = draw((2, 12, 20, 4, 7), device)

    def step(images, index):
        return embed_patches(images, patch_size, index, mean=MEAN, std=STD) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_kept in (7, 5, 2):
        torch.testing.assert_close(compiled(images, index[:, :num_kept]), step(images, index[:, :num_kept]))


def test_offsets_beyond_32_bits(device):
    # 2**31 bytes apart: an offset in 32 bits would be negative. Only a few pages are ever touched.
    memory = torch.empty(2**31 + 3 * 16, dtype=torch.uint8, device=device)
    images = memory.as_strided((3, 3, 4, 4), (2**30, 16, 4, 1))
    images.copy_(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1))
    output = embed_patches(images, 4, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(output[:, 0, 5].cpu() * 255, torch.arange(3.0))


@pytest.mark.parametrize("num_channels", [1, 5])
@pytest.mark.parametrize("num_kept", [3, None])
def test_other_numbers_of_channels(device, num_channels, num_kept):
    images, patch_size, index = draw((2, 8, 12, 4, num_kept), device)
    images = images.repeat(1, 2, 1, 1)[:, :num_channels]
    mean, std = [0.1 * c for c in range(num_channels)], [0.2 + 0.1 * c for c in range(num_channels)]
    reference = embed_patches_reference(images, patch_size, index, mean=mean, std=std)
    output = embed_patches(images, patch_size, index, mean=mean, std=std)
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain.embed_patches(images, patch_size, index, mean=mean, std=std), output)
    torch.library.opcheck(embed_patches_op, (images, patch_size, index, mean, std, torch.float32))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(1, 3, 8, 8)}, TypeError, "images must be one of uint8"),
        ({"images": torch.zeros(3, 8, 8, dtype=torch.uint8)}, ValueError, "images must have 4 dimensions"),
        ({"images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}, ValueError, r"must be \[B, 3, H, W\].*permute"),
        ({"images": torch.zeros(1, 3, 8, 10, dtype=torch.uint8)}, ValueError, "8 x 10 pixels does not divide"),
        ({"patch_size": 0}, ValueError, "does not divide into patches of 0"),
        ({"std": (1, 0, 1)}, ValueError, "std positive"),
        ({"mean": (1, 1)}, ValueError, "a number for each channel"),
        ({"dtype": torch.int32}, TypeError, "dtype must be"),
        ({"index": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, "index has 2 rows but there are 1 images"),
        ({"index": torch.zeros(1, 1)}, TypeError, "index must be one of"),
        ({"index": torch.zeros(1, 1, dtype=torch.int64, device="meta")}, ValueError, "index is on meta"),
    ],
)
def test_misuse(arguments, error, message):
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        embed_patches(**{"images": images, "patch_size": 4, "mean": MEAN, "std": STD, **arguments})


def test_index_out_of_range_in_debug_mode(device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    images, patch_size, index = draw((2, 12, 20, 4, 7), device)
    index[0, 0] = -1
    with pytest.raises(IndexError, match=r"index has entries in \[-1, \d+\], outside \[0, 14\]"):
        embed_patches(images, patch_size, index, mean=MEAN, std=STD)
