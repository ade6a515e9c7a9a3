"""`dmtjepa.load`: encoders from every place where weights are, with outputs equal to those of their own library."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dmtjepa
from dmtjepa.cli.weights import main
from dmtjepa.config import parse_config
from dmtjepa.data.crop import crop_center
from dmtjepa.data.decode import CorruptImage
from dmtjepa.errors import UserError
from dmtjepa.interop import WeightsError, load_model, read_checkpoint, write_official
from dmtjepa.interop.sources import find_initial_weights
from dmtjepa.interop.weights import MODULES
from dmtjepa.objective import build_model
from dmtjepa.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data": {"crop_size": 32, "dataset": "shapes"},
    "mask": {"patch_size": 8, "min_keep": 1},
    "patch": {"local_agg_head": True},
    "meta": {"model_name": "vit_nano", "pred_depth": 1, "pred_emb_dim": 48},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with settings and an export whose teacher and student differ."""
    folder = tmp_path_factory.mktemp("run")
    config = parse_config(SETTINGS)
    (folder / "config.yaml").write_text(config.to_yaml())
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.teacher_encoder.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    parts = {"encoder": model.encoder, "predictor": model.predictor, "target_encoder": model.teacher_encoder}
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "jepa-latest.pth.tar")
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def export(run: Path, out: Path, format: str) -> Path:
    assert main(["export", str(run), "--out", str(out), "--format", format]) == 0
    return out


def test_an_encoder_takes_images_of_any_kind(run):
    encoder = dmtjepa.load(run)
    assert encoder.image_size == (32, 32)
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    batch = torch.stack([encoder.preprocess(image) for image in (photograph, photograph.convert("L"))])
    assert torch.equal(batch[0].permute(1, 2, 0), torch.from_numpy(crop_center(photograph, (32, 32))))
    patches, pooled = encoder.features(batch)
    assert patches.shape == (2, 16, 128)
    torch.testing.assert_close(pooled, patches.mean(1))
    assert not patches.requires_grad
    with pytest.raises(ValueError, match=r"must be \[B,3,H,W\], got \[3, 32, 32\]"):
        encoder.features(batch[0])


def test_teacher_student_and_another_size(run, images):
    teacher, student = dmtjepa.load(run), dmtjepa.load(run / "jepa-latest.pth.tar", part="encoder")
    assert not torch.allclose(teacher.features(images).pooled, student.features(images).pooled)
    weights = read_checkpoint(run / "jepa-latest.pth.tar")
    assert torch.equal(teacher.model.norm.weight, weights["target_encoder"]["norm.weight"])
    assert torch.equal(student.model.norm.weight, weights["encoder"]["norm.weight"])
    assert dmtjepa.load(run, image_size=(48, 64)).features(torch.zeros(1, 3, 48, 64)).patches.shape == (1, 48, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device 'gpu': write cpu, cuda or cuda:N"),
        ({"device": torch.device("mps")}, "device 'mps': dmtjepa runs on cpu or cuda"),
        ({"image_size": "32"}, r"image_size must be an int or \(height, width\), not '32'"),
        ({"image_size": [32, 32]}, r"not \[32, 32\]"),
        ({"image_size": (32, 32, 3)}, r"not \(32, 32, 3\)"),
    ],
)
def test_wrong_options_are_explained(run, options, message):
    with pytest.raises(UserError, match=message):
        dmtjepa.load(run, **options)


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_what_was_exported_comes_back_equal(run, tmp_path, format):
    own = dmtjepa.load(run).model.state_dict()
    again = dmtjepa.load(export(run, tmp_path / format, format)).model.state_dict()
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own)
    assert main(["show", str(tmp_path / format)]) == 0


@pytest.mark.slow
def test_four_channels_and_their_normalization_go_out_and_come_back(tmp_path, capsys):
    data = {
        "crop_size": 32,
        "channels": 4,
        "mean": [0.1, 0.2, 0.3, 0.4],
        "std": [0.5, 0.6, 0.7, 0.8],
        "max_value": 4095,
    }
    config = parse_config(SETTINGS | {"data": data})
    model = build_model(config)
    names = ("encoder", "predictor", "target_encoder")
    weights = {name: getattr(model, MODULES[name]).state_dict() for name in names}
    write_official(tmp_path / "run.pth.tar", weights, {"config": config.model_dump(mode="json")})
    encoder = dmtjepa.load(tmp_path / "run.pth.tar")
    assert encoder.max_value == 4095
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    images = encoder.preprocess(Image.fromarray(pixels))[None]
    assert torch.equal(images[0].permute(1, 2, 0), torch.from_numpy(pixels))
    normalised = (images / 255 - torch.tensor(data["mean"])[:, None, None]) / torch.tensor(data["std"])[:, None, None]
    expected = encoder.features(images).patches
    torch.testing.assert_close(encoder.features(normalised).patches, expected, atol=1e-5, rtol=0)
    for format, name in (("timm", "timm"), ("hf", "hf"), ("official", "o.pth.tar"), ("safetensors", "w.safetensors")):
        again = dmtjepa.load(export(tmp_path / "run.pth.tar", tmp_path / name, format))
        assert (again.model.mean, again.model.std) == (tuple(data["mean"]), tuple(data["std"])), format
        assert torch.equal(again.features(images).patches, expected), format
    assert "mean 0.1, 0.2, 0.3, 0.4 and the standard deviation" in (tmp_path / "timm" / "README.md").read_text()
    theirs = pytest.importorskip("timm").create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(theirs.forward_features(normalised), expected, atol=1e-5, rtol=0)
    theirs = pytest.importorskip("transformers").IJepaModel.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(normalised).last_hidden_state, expected, atol=1e-5, rtol=0)
    with pytest.raises(WeightsError, match=r"for images of 4 channels[\s\S]*data\.channels to the file's"):
        load_model(build_model(parse_config(SETTINGS)), tmp_path / "timm" / "model.safetensors")
    with pytest.raises(CorruptImage, match=r"3 channels, not data\.channels = 4"):
        encoder.preprocess(Image.new("RGB", (40, 40)))


@pytest.mark.slow
def test_a_model_of_hugging_face(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
    config = transformers.IJepaConfig(image_size=32, patch_size=8, layer_norm_eps=1e-6, **sizes)
    theirs = transformers.IJepaModel(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
    torch.testing.assert_close(dmtjepa.load(tmp_path).features(images).patches, expected, atol=1e-5, rtol=0)
    classifier = transformers.IJepaForImageClassification(config).eval()  # its names begin with `ijepa.`
    classifier.save_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        expected = classifier.ijepa(images).last_hidden_state
    own = dmtjepa.load(tmp_path / "classifier").features(images).patches
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_model_of_timm(images, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 2}
    theirs = timm.create_model("vit_huge_patch14_gap_224", **sizes).eval()
    timm.models.save_for_hf(theirs, tmp_path, model_args=sizes, safe_serialization=True)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    torch.testing.assert_close(dmtjepa.load(tmp_path).features(images).patches, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_a_run_starts_from_an_encoder(run, tmp_path, format):
    folder = export(run, tmp_path / format, format)
    config = parse_config(
        SETTINGS | {"meta": SETTINGS["meta"] | {"load_checkpoint": True, "read_checkpoint": str(folder)}}
    )
    path = find_initial_weights(config, RunFolder(tmp_path / "run", "jepa"))
    assert path == folder / "model.safetensors"
    model = build_model(config)
    predictor = {name: value.clone() for name, value in model.predictor.state_dict().items()}
    assert load_model(model, path) == ["predictor", "head", "target_head"]
    given = read_checkpoint(run / "jepa-latest.pth.tar")["target_encoder"]
    for encoder in (model.encoder, model.teacher_encoder):
        assert all(torch.equal(value, given[name]) for name, value in encoder.state_dict().items())
    assert all(torch.equal(value, predictor[name]) for name, value in model.predictor.state_dict().items())


def spoil_with_a_class_token(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"cls_token": torch.zeros(1, 1, 128)}, folder / "model.safetensors")


def spoil_with_other_heads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["num_heads"] = 4
    (folder / "config.json").write_text(json.dumps(config))


def spoil_by_cutting(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:1000])


def spoil_by_sharding(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_with_a_class_token, "holds cls_token: its model has a token beside the patches"),
        (spoil_with_other_heads, "with 4 attention heads; here it has 2"),
        (spoil_by_cutting, "cannot be read as a file of safetensors"),
        (spoil_by_sharding, "save the model again in one file"),
    ],
)
def test_what_cannot_be_loaded_is_explained(run, tmp_path, spoil, message):
    folder = export(run, tmp_path / "timm", "timm")
    spoil(folder)
    with pytest.raises(WeightsError, match=message):
        dmtjepa.load(folder)


@pytest.mark.slow
def test_the_package_imports_nothing_that_takes_long():
    program = "import sys, dmtjepa; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; dmtjepa.load"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=600)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        dmtjepa.lode  # noqa: B018
