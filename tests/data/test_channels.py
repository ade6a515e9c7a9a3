"""Images of one, four and more channels, and arrays: decoding, loaders, and what `dmtjepa check` measures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmtjepa.cli import check
from dmtjepa.cli.shards import main as make_shards
from dmtjepa.config import ConfigError, DataSettings, parse_config
from dmtjepa.data import build_eval_loader, build_loader, open_images
from dmtjepa.data.augment import blur
from dmtjepa.data.crop import crop_and_resize, to_array
from dmtjepa.data.decode import CorruptImage, decode_image
from dmtjepa.data.sampling import NUM_DRAWS
from tests.helpers.images import LOADERS, contents, encode


def save(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def batches(settings: DataSettings, **changes: object) -> torch.Tensor:
    loader = build_loader(settings.model_copy(update=changes), seed=3)
    found = torch.cat(list(loader.epoch(0)))
    loader.close()
    return found


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rgb/, rgba/ and npy/ with the same 8 images; the fourth channel of two of them is not the third's."""
    folder = tmp_path_factory.mktemp("four")
    rng = np.random.default_rng(0)
    for kind in ("rgb", "rgba", "npy"):
        (folder / kind).mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 50, 4), dtype=np.uint8)
        pixels[:20, :, 3] = 0  # as a transparent region: its colours count all the same
        Image.fromarray(pixels[..., :3]).save(folder / "rgb" / f"{number}.png")
        Image.fromarray(pixels).save(folder / "rgba" / f"{number}.png")
        wide = pixels.astype(np.uint16) * 257
        (folder / "npy" / f"{number}.npy").write_bytes(save(wide if number % 2 else wide.transpose(2, 0, 1)))
    return folder


def test_channels_are_taken_as_they_are_stored():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for data in (encode(Image.fromarray(pixels)), save(pixels), save(np.asfortranarray(pixels)), save(pixels / 255)):
        assert np.array_equal(to_array(decode_image(data, channels=4)), pixels)
    two = encode(Image.fromarray(pixels[..., :2]))
    assert np.array_equal(to_array(decode_image(two, channels=2)), pixels[..., :2])
    six = np.concatenate([pixels, pixels[..., :2]], 2)
    assert np.array_equal(to_array(decode_image(save(six.transpose(2, 0, 1)), channels=6)), six)
    assert np.array_equal(np.asarray(decode_image(save(pixels[..., :3]))), pixels[..., :3])
    first = pixels[..., 0]
    for grey in (save(first), save(np.asfortranarray(first)), encode(Image.fromarray(first))):
        assert np.array_equal(to_array(decode_image(grey, channels=1)), pixels[..., :1])
    sixteen = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(to_array(decode_image(encode(sixteen), channels=1)), pixels[..., :1])
    color = Image.fromarray(pixels[..., :3])
    assert decode_image(encode(color), channels=1).tobytes() == color.convert("L").tobytes()


def test_max_value_scales_what_has_more_than_eight_bits(tmp_path: Path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65  # up to 4095: 12 bits
    expected = np.rint(values / np.float32(4095) * 255).astype(int)
    for data in (encode(Image.fromarray(values)), save(values), save(values.astype(np.float32))):
        found = to_array(decode_image(data, channels=1, max_value=4095))[..., 0].astype(int)
        assert np.abs(found - expected).max() <= 1
        assert decode_image(data, channels=1, max_value=2000).getextrema()[1] == 255
    eight = encode(Image.fromarray(np.full((8, 8), 7, np.uint8)))
    assert decode_image(eight, channels=1, max_value=4095).getextrema() == (7, 7)
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encode(Image.fromarray(np.full((16, 16), 4095, np.uint16))))
    settings = DataSettings(root_path=str(tmp_path), batch_size=4, crop_size=8, num_workers=0, channels=1)
    for loader in ("pil", "auto"):  # auto: DALI where it is installed
        assert batches(settings, loader=loader, max_value=4095).unique().tolist() == [255]
        assert batches(settings, loader=loader).unique().tolist() == [16]
    images, _, _ = next(iter(build_eval_loader(tmp_path, 8, 4, channels=1, max_value=4095)))
    assert images.unique().tolist() == [255]


def test_other_images_count_as_corrupt():
    array = save(np.zeros((8, 8, 5), np.uint16))
    for data, channels, reason in (
        (encode(Image.new("RGB", (8, 8))), 4, "3 channels, not data.channels = 4"),
        (array, 4, r"shape \[8, 8, 5\], not \[H, W, 4\] or \[4, H, W\]"),
        (array[:-1], 5, "truncated array"),
        (save(np.array([[{}]])), 1, "not of numbers"),
        (save(np.full((8, 8), 70_000)), 1, "integers from 0 to 70000"),
        (array[:20], 5, "ValueError"),
        (save(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(20000, 20000)"), 1, "exceed"),
    ):
        with pytest.raises(CorruptImage, match=reason):
            decode_image(data, channels=channels)


def test_each_channel_is_resized_by_itself(four: Path):
    """PIL would weight colours with the alpha channel."""
    settings = DataSettings(root_path=str(four), batch_size=4, crop_size=24, num_workers=0, loader="pil")
    expected = batches(settings, image_folder="rgb")
    found = batches(settings, image_folder="rgba", channels=4)
    assert found.shape == (8, 4, 24, 24)
    assert torch.equal(found[:, :3], expected)
    assert not torch.equal(found[:, 3], expected[:, 2])
    assert torch.equal(batches(settings, image_folder="npy", channels=4, loader="auto"), found)
    images, _, names = next(iter(build_eval_loader(four / "npy", 24, 8, channels=4)))
    assert images.shape == (8, 4, 24, 24)
    assert torch.equal(images[:, :3], next(iter(build_eval_loader(four / "rgb", 24, 8)))[0])
    assert names[0].endswith("npy/0.npy")


@pytest.mark.parametrize("loader", LOADERS)
def test_grey_images(loader: str, settings: DataSettings, image_folder: Path, tmp_path: Path):
    expected = batches(settings, channels=1)
    assert expected.shape[1:] == (1, 32, 32)
    found = batches(settings, channels=1, loader=loader)
    assert (found.int() - expected.int()).abs().max() <= 2
    for number, path in enumerate(sorted(image_folder.rglob("*.jpg"))[:8]):  # not for DALI's decoder: 16 bits
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
    changes = {"root_path": str(tmp_path), "channels": 1}
    assert torch.equal(batches(settings, **changes, loader=loader), batches(settings, **changes))


def test_blur_of_any_number_of_channels():
    images = torch.randint(256, (2, 5, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    uniforms = np.full((2, NUM_DRAWS), 0.4)
    blurred = blur(images, uniforms)
    assert torch.equal(blurred[:, 1:4], blur(images[:, 1:4], uniforms))


def test_shards_of_arrays(four: Path, tmp_path: Path):
    assert make_shards([str(four / "npy"), str(tmp_path / "shards")]) == 0
    assert contents(open_images(tmp_path / "shards")) == contents(open_images(four / "npy"))


def test_settings():
    for changes, message in (
        ({"mean": [0.5]}, "mean: 1 numbers for 3 channels"),
        ({"channels": 1, "std": [0.2, 0.2, 0.2]}, "std: 3 numbers for 1 channels"),
        ({"std": [0.2, 0.0, 0.2]}, "greater than 0|more than 0|larger than 0"),
        ({"channels": 4, "use_color_distortion": True}, "use_color_distortion: needs 3 channels"),
        ({"channels": 4, "loader": "dali"}, "loader: dali reads images of 1 or 3 channels"),
        ({"channels": 1, "dataset": "shapes"}, "the drawn images"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({"data": changes})


def test_check_measures_mean_and_standard_deviation(tmp_path: Path, capsys):
    for number, value in enumerate((0, 255)):
        pixels = np.full((8, 8, 4), 51, np.uint8)
        pixels[..., 0] = value
        (tmp_path / f"{number}.npy").write_bytes(save(pixels))
    assert check.main([str(tmp_path), "--workers", "1", "--channels", "4"]) == 0
    text = capsys.readouterr().out
    assert "formats     NPY 2" in text
    assert "pixels      of 2 images" in text
    assert "data.mean=[0.5,0.2,0.2,0.2] data.std=[0.5,0,0,0]" in text
    assert check.main([str(tmp_path), "--workers", "1", "--channels", "4", "--measured", "1"]) == 0
    assert "data.mean=[0,0.2,0.2,0.2]" in capsys.readouterr().out
    assert crop_and_resize(decode_image(save(pixels), channels=4), (0, 0, 8, 8), (4, 4)).shape == (4, 4, 4)
