import pytest
import torch

from dmtjepa.evaluation.features import extract_features, extract_patches, extract_pixels, last_layers
from dmtjepa.models import VisionTransformer


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(16, 8, embed_dim=24, depth=3, num_heads=2)


@pytest.fixture
def batches():
    """Three batches, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 4, 2)
    images = [torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator) for n in sizes]
    return [(image, torch.arange(len(image)), [str(i) for i in range(len(image))]) for image in images]


def test_pooled_features_are_the_mean_of_patch_features(encoder, batches):
    features = extract_features(encoder, batches, progress=False)
    patches = torch.cat([extract_patches(encoder, images) for images, _, _ in batches])
    assert patches.shape == (10, 4, 24)
    torch.testing.assert_close(features.pooled, patches.mean(1))
    assert features.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert not features.pooled.requires_grad
    assert features.pooled.dtype == torch.float32


@pytest.mark.parametrize(("size", "grid_size", "side"), [(16, (2, 2), 2), (64, (8, 8), 4)])
def test_layout_is_the_mean_of_each_field_of_the_grid(size, grid_size, side):
    torch.manual_seed(0)
    encoder = VisionTransformer(size, 8, embed_dim=24, depth=1, num_heads=2)
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    features = extract_features(encoder, [(images, None, [""] * 3)], grid_size=grid_size, progress=False)
    patches = extract_patches(encoder, images).unflatten(1, grid_size)
    step = grid_size[0] // side
    expected = [
        patches[:, step * row : step * (row + 1), step * column : step * (column + 1)].mean((1, 2))
        for row in range(side)
        for column in range(side)
    ]
    torch.testing.assert_close(features.layout, torch.cat(expected, dim=1))
    torch.testing.assert_close(features.pooled, torch.stack(expected).mean(0))


def test_last_layers_are_concatenated_with_the_last_one_last(encoder, batches):
    one = extract_features(encoder, batches, progress=False).pooled
    two = extract_features(encoder, batches, num_layers=2, progress=False).pooled
    assert two.shape == (10, 48)
    torch.testing.assert_close(two[:, 24:], one)
    encoder.blocks = encoder.blocks[:2]  # its last output is what was the last but one
    torch.testing.assert_close(two[:, :24], extract_features(encoder, batches, progress=False).pooled)
    assert not any(block._forward_hooks for block in encoder.blocks)


def test_refuses_more_layers_than_there_are(encoder, batches):
    with pytest.raises(ValueError, match="not between 1 and the 3 blocks of the encoder"):
        last_layers(encoder, batches[0][0], 4)


def test_unlabelled_images_have_features(encoder, batches):
    assert extract_features(encoder, [(images, None, names) for images, _, names in batches]).labels is None


def test_no_images_is_an_error(encoder):
    with pytest.raises(ValueError, match="validation: no images"):
        extract_features(encoder, [], description="validation", progress=False)
    with pytest.raises(ValueError, match="no images"):
        extract_pixels([])


def test_pixels_ignore_brightness_and_are_at_most_32_a_side():
    images = torch.randint(100, (2, 3, 96, 64), dtype=torch.uint8)
    batch = [(torch.cat([images, images + 100]), torch.zeros(4, dtype=torch.int64), [""] * 4)]
    pixels = extract_pixels(batch).pooled
    assert pixels.shape == (4, 3 * 32 * 32)
    torch.testing.assert_close(pixels[:2], pixels[2:], atol=1e-5, rtol=0)
    small = extract_pixels([(images[:, :, :5, :7], None, ["", ""])])
    assert small.pooled.shape == (2, 3 * 5 * 7)
    assert small.labels is None


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_is_close_to_float32_on_the_cpu(batches):
    torch.manual_seed(0)
    arguments = {"embed_dim": 64, "depth": 3, "num_heads": 2}
    encoder = VisionTransformer(16, 8, **arguments)
    on_gpu = VisionTransformer(16, 8, **arguments, device_type="cuda")
    on_gpu.load_state_dict(encoder.state_dict())
    expected = extract_features(encoder, batches, progress=False).pooled
    features = extract_features(on_gpu, batches, device="cuda", progress=False)
    assert features.pooled.device.type == "cpu"
    torch.testing.assert_close(features.pooled, expected, atol=0.03, rtol=0.03)
