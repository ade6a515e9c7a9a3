"""Encoders as ONNX and `.pt2` files compute what `dmtjepa.load` computes; safetensors files hold the same weights."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import dmtjepa
from dmtjepa.cli.weights import main
from dmtjepa.interop import build_encoder
from dmtjepa.models import ARCHITECTURES, VisionTransformer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    """A network of one block: exporters take about a second for each further one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "vit_nano", ARCHITECTURES["vit_nano"] | {"depth": 1})
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A `.pth.tar` file of a teacher for images of 32 pixels."""
    path = tmp_path_factory.mktemp("weights") / "a.pth.tar"
    torch.manual_seed(0)
    encoder = VisionTransformer(32, 8, **ARCHITECTURES["vit_nano"], init_std=0.1)
    torch.save({"target_encoder": encoder.state_dict()}, path)
    return path


def export(weights: Path, out: Path, *arguments: str) -> int:
    return main(["export", str(weights), "--format", out.suffix[1:], "--out", str(out), *arguments])


def normalise(photograph: Image.Image, preprocessing: dict) -> np.ndarray:
    """float32 [1,3,H,W] of an image that has the shape of the crop already, as the description says."""
    pixels = np.asarray(photograph, np.float32) / preprocessing["divide_by"]
    pixels = (pixels - np.float32(preprocessing["mean"])) / np.float32(preprocessing["std"])
    return pixels.transpose(2, 0, 1)[None]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "beside"), [((32, 32), False), ((48, 64), True)])
def test_onnx_gives_equal_outputs(weights, tmp_path, monkeypatch, size, beside):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if beside:
        monkeypatch.setattr("dmtjepa.interop.programs.MAX_ONNX_BYTES", 0)
    out = tmp_path / "encoder.onnx"
    assert export(weights, out, "--image-size", f"{size[0]}x{size[1]}") == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"encoder.onnx", "encoder.onnx.md"} | ({"encoder.onnx.data"} if beside else set())
    assert str(ROOT).encode() not in out.read_bytes()

    session = onnxruntime.InferenceSession(out)
    (given,) = session.get_inputs()
    assert (given.name, given.shape, given.type) == ("images", ["batch", 3, *size], "tensor(float)")
    encoder = dmtjepa.load(weights, image_size=size)
    for batch in (1, 5):
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        outputs = session.run(["patches", "pooled"], {"images": images.numpy()})
        for output, expected in zip(outputs, encoder.features(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-5, rtol=0)

    preprocessing = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert preprocessing["center_crop"] == list(size)
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    (pooled,) = session.run(["pooled"], {"images": normalise(photograph, preprocessing)})
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None]
    torch.testing.assert_close(torch.from_numpy(pooled), encoder.features(pixels).pooled, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_exported_program_gives_equal_outputs(weights, tmp_path):
    out, size = tmp_path / "encoder.pt2", (48, 64)
    assert export(weights, out, "--image-size", "48x64") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.pt2", "encoder.pt2.md"}
    assert str(ROOT).encode() not in out.read_bytes()
    extra_files = {"preprocessing.json": ""}
    program = torch.export.load(out, extra_files=extra_files).module()
    assert json.loads(extra_files["preprocessing.json"])["center_crop"] == list(size)
    for batch in (1, 5):
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
        expected = dmtjepa.load(weights, image_size=size).features(images)
        for output, value in zip(program(images), expected, strict=True):
            torch.testing.assert_close(output, value, atol=1e-5, rtol=0)


def test_safetensors_hold_the_same_weights(weights, tmp_path):
    out = tmp_path / "encoder.safetensors"
    assert export(weights, out) == 0
    given = torch.load(weights)["target_encoder"]
    loaded = dmtjepa.load(out).model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in loaded.items())
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["preprocessing"])["resize_shorter_side"] == 37


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_names_say_what_a_file_is(weights, tmp_path, capsys, suffix):
    out = tmp_path / "encoder"
    assert main(["export", str(weights), "--format", suffix[1:], "--out", str(out)]) == 1
    assert f"has a name that ends with {suffix}" in capsys.readouterr().err
    out.with_suffix(suffix).write_text("mine")
    assert export(weights, out.with_suffix(suffix)) == 1
    assert "already exists" in capsys.readouterr().err
    assert out.with_suffix(suffix).read_text() == "mine"


def test_missing_packages_are_named(weights, tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find_spec(name, *rest)
    )
    assert export(weights, tmp_path / "encoder.onnx") == 1
    assert "export to ONNX needs packages that are not installed: pip install onnxscript" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_image_sizes_that_do_not_fit_are_refused(weights, tmp_path, capsys):
    assert export(weights, tmp_path / "a.onnx", "--image-size", "36") == 1
    assert "36x36 is not a multiple of the patch size 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export(weights, tmp_path / "a.onnx", "--image-size", "large")
    assert "'large': write 448" in capsys.readouterr().err
    official = ["export", str(weights), "--format", "official", "--out", str(tmp_path / "b"), "--image-size", "64"]
    assert main(official) == 1
    assert "omit --image-size" in capsys.readouterr().err
    with pytest.raises(ValueError, match="smaller than a patch"):
        build_encoder(torch.load(weights)["target_encoder"], "file", image_size=4)
