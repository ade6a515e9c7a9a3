import errno
import importlib.util
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from dmtjepa.cli.weights import main
from dmtjepa.config import parse_config
from dmtjepa.data.crop import crop_center
from dmtjepa.interop import build_encoder, export_official, load_model, read_checkpoint, write_official
from dmtjepa.interop.model_card import Origin, find_origin, format_card
from dmtjepa.interop.weights import EncoderShape
from dmtjepa.models import ARCHITECTURES
from dmtjepa.objective import build_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with settings and a checkpoint whose teacher and student differ."""
    folder = tmp_path_factory.mktemp("run")
    config = parse_config(
        {
            "data": {"crop_size": 32, "dataset": "shapes"},
            "mask": {"patch_size": 8, "min_keep": 1},
            "patch": {"local_agg_head": True},
            "meta": {"model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 48},
        }
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.teacher_encoder.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    checkpoint = {
        "encoder": model.encoder.state_dict(),
        "predictor": model.predictor.state_dict(),
        "target_encoder": model.teacher_encoder.state_dict(),
        "head": model.head.state_dict(),
        "target_head": model.teacher_head.state_dict(),
        "epoch": 3,
        "loss": 0.25,
    }
    torch.save(checkpoint, folder / "jepa-latest.pth.tar")
    return folder


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def encode(run, part, images):
    return build_encoder(read_checkpoint(run / "jepa-latest.pth.tar")[part], "run").eval()(images)


def export(run, out, *arguments):
    assert main(["export", str(run), "--out", str(out), *arguments]) == 0


@pytest.mark.slow
def test_official_layout_round_trip(run, images, tmp_path):
    export(run, tmp_path / "a.pth.tar", "--format", "official")
    raw = torch.load(tmp_path / "a.pth.tar", weights_only=True)
    assert {"encoder", "predictor", "target_encoder", "head", "target_head", "epoch", "loss"} == set(raw)
    assert all(name.startswith("module.") for name in raw["encoder"])
    before, after = read_checkpoint(run / "jepa-latest.pth.tar"), read_checkpoint(tmp_path / "a.pth.tar")
    for part in ("encoder", "predictor", "target_encoder", "head", "target_head"):
        assert before[part].keys() == after[part].keys()
        assert all(torch.equal(value, after[part][name]) for name, value in before[part].items())
    # What was exported can be exported again, without a run folder.
    export(tmp_path / "a.pth.tar", tmp_path / "timm", "--format", "timm")
    torch.testing.assert_close(
        load_file(tmp_path / "timm" / "model.safetensors")["norm.weight"], before["target_encoder"]["norm.weight"]
    )


def test_an_official_file_comes_back_equal(tmp_path):
    """Of I-JEPA, whose files have no heads: exported as it is, and after a run has started from it."""
    meta = {"model_name": "vit_nano", "pred_depth": 1, "pred_emb_dim": 48}
    settings = {"data": {"crop_size": 32}, "mask": {"patch_size": 8}, "patch": {"local_agg_head": False}, "meta": meta}
    config = parse_config(settings)
    given, modules = {"epoch": 300, "batch_size": 2048, "world_size": 16, "lr": 1e-3, "opt": {}, "scaler": None}, {}
    for seed, part in enumerate(("encoder", "predictor", "target_encoder")):
        torch.manual_seed(seed)
        model = build_model(config)
        modules[part] = getattr(model, part.replace("target", "teacher")).state_dict()
        given[part] = {f"module.{name}": value for name, value in modules[part].items()}
    torch.save(given, tmp_path / "official.pth.tar")

    export(tmp_path / "official.pth.tar", tmp_path / "a.pth.tar", "--format", "official")
    own = build_model(config)
    load_model(own, tmp_path / "official.pth.tar")
    parts = {"encoder": own.encoder, "predictor": own.predictor, "target_encoder": own.teacher_encoder}
    write_official(tmp_path / "b.pth.tar", {part: module.state_dict() for part, module in parts.items()}, {})
    for name in "ab":
        back = torch.load(tmp_path / f"{name}.pth.tar", weights_only=True)
        for part in modules:
            assert list(back[part]) == list(given[part])
            assert all(torch.equal(value, given[part][key]) for key, value in back[part].items())
            assert all(value.dtype == given[part][key].dtype for key, value in back[part].items())
    numbers = torch.load(tmp_path / "a.pth.tar", weights_only=True)
    assert {name: numbers[name] for name in ("epoch", "batch_size", "world_size", "lr")} == {
        name: given[name] for name in ("epoch", "batch_size", "world_size", "lr")
    }


def test_the_format_has_its_earlier_name_too(run, tmp_path):
    export(run, tmp_path / "a.pth.tar", "--format", "official")
    export(run, tmp_path / "b.pth.tar", "--format", "released")
    assert (tmp_path / "a.pth.tar").stat().st_size == (tmp_path / "b.pth.tar").stat().st_size


def test_hugging_face_names_are_those_of_facebook_ijepa(run, tmp_path):
    export(run, tmp_path / "hf", "--format", "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    layer = ("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
    layer += tuple(f"attention.{n}" for n in ("attention.query", "attention.key", "attention.value", "output.dense"))
    names = {"embeddings.position_embeddings"}
    names |= {f"{n}.{k}" for n in ("embeddings.patch_embeddings.projection", "layernorm") for k in ("weight", "bias")}
    names |= {f"encoder.layer.{i}.{n}.{k}" for i in range(12) for n in layer for k in ("weight", "bias")}
    assert set(weights) == names
    qkv = read_checkpoint(run / "jepa-latest.pth.tar")["target_encoder"]["blocks.5.attn.qkv.weight"]
    parts = [weights[f"encoder.layer.5.attention.attention.{name}.weight"] for name in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), qkv)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "ijepa"
    assert (config["hidden_size"], config["intermediate_size"], config["image_size"]) == (192, 768, 32)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["target_encoder", "encoder"])
def test_timm_gives_equal_outputs(run, images, tmp_path, part):
    timm = pytest.importorskip("timm")
    export(run, tmp_path / "timm", "--format", "timm", "--part", part)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    expected = encode(run, part, images)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(images), expected.mean(1), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_timm_reads_the_official_layout(run, images, tmp_path):
    timm = pytest.importorskip("timm")
    export(run, tmp_path / "a.pth.tar", "--format", "official")
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3}
    model = timm.create_model("vit_huge_patch14_gap_224", num_classes=0, **size).eval()
    timm.models.load_checkpoint(
        model, str(tmp_path / "a.pth.tar"), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn
    )
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), encode(run, "encoder", images), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_hugging_face_gives_equal_outputs(run, images, tmp_path):
    transformers = pytest.importorskip("transformers")
    export(run, tmp_path / "hf", "--format", "hf")
    model, info = transformers.IJepaModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        output = model.eval()(images).last_hidden_state
    torch.testing.assert_close(output, encode(run, "target_encoder", images), atol=1e-5, rtol=0)


@pytest.fixture
def photographs():
    """Images of several sizes, none smaller than the 37 pixels that the shorter side is resized to."""
    generator = np.random.default_rng(0)
    sizes = ((150, 100), (64, 64), (90, 201), (320, 40))
    return [
        Image.fromarray(generator.integers(0, 255, (7, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for size in sizes
    ]


def similarity_to_ours(run, photographs, prepare):
    """Smallest cosine of pooled features, minus their mean, of images as the evaluation crops them and as `prepare`."""
    crops = torch.stack([torch.from_numpy(crop_center(image, (32, 32))).permute(2, 0, 1) for image in photographs])
    ours = encode(run, "target_encoder", crops).mean(1)
    theirs = encode(run, "target_encoder", torch.stack([prepare(image) for image in photographs])).mean(1)
    return torch.cosine_similarity(ours - ours.mean(0), theirs - ours.mean(0)).min().item()


@pytest.mark.slow
def test_hugging_face_crops_as_the_evaluation(run, photographs, tmp_path):
    transformers = pytest.importorskip("transformers")
    export(run, tmp_path / "hf", "--format", "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")

    def prepare(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    assert similarity_to_ours(run, photographs, prepare) > 0.99


@pytest.mark.slow
def test_timm_crops_as_the_evaluation(run, photographs, tmp_path):
    timm = pytest.importorskip("timm")
    export(run, tmp_path / "timm", "--format", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert similarity_to_ours(run, photographs, prepare) > 0.998


@pytest.mark.slow
@pytest.mark.parametrize("format", ["timm", "hf", "official"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(run, tmp_path, capsys, format, value):
    checkpoint = torch.load(run / "jepa-latest.pth.tar", weights_only=True)
    checkpoint["target_encoder"]["blocks.3.attn.proj.weight"][1, 2] = value
    torch.save(checkpoint, tmp_path / "a.pth.tar")
    assert main(["export", str(tmp_path / "a.pth.tar"), "--format", format, "--out", str(tmp_path / "out")]) == 1
    assert "not finite (blocks.3.attn.proj.weight)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exported_files_appear_whole_and_with_the_permissions_of_new_files(run, tmp_path, monkeypatch):
    export(run, tmp_path / "hf", "--format", "hf")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in [tmp_path / "new", *(tmp_path / "hf").iterdir()]}
    assert len(modes) == 1

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert main(["export", str(run), "--format", "timm", "--out", str(tmp_path / "timm")]) == 1
    assert list((tmp_path / "timm").iterdir()) == []


class SmallDisk(io.FileIO):
    """A file on a disk with room for some of its writes."""

    def write(self, block):
        if self.tell() > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block)


def test_a_full_disk_is_named(run, tmp_path, monkeypatch):
    """The zip writer of torch reports a failed write, unless it is the first, as `unexpected pos`."""
    monkeypatch.setattr("dmtjepa.interop.official.open_atomically", lambda path: SmallDisk(path, "wb"))
    with pytest.raises(OSError, match="No space left"):
        export_official(read_checkpoint(run / "jepa-latest.pth.tar"), tmp_path / "a.pth.tar")


def test_show_says_what_a_file_holds(run, capsys):
    assert main(["show", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "target_encoder: 5.4 M values in 149 tensors: vit_tiny with patches of 8 pixels" in printed
    assert "epoch: 3" in printed


@pytest.mark.parametrize("format", ["timm", "hf", "official"])
def test_nothing_is_overwritten(run, tmp_path, capsys, format):
    out = tmp_path / "out"
    if format == "official":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "model.safetensors").write_text("mine")
    assert main(["export", str(run), "--format", format, "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert (out if format == "official" else out / "model.safetensors").read_text() == "mine"


def test_what_is_mistyped_is_explained(run, tmp_path, capsys):
    assert main(["show", f"{run}n"]) == 1
    assert f"{run}n does not exist. Did you mean {run}?" in capsys.readouterr().err
    assert main(["verify", f"{run}n"]) == 1
    assert f"{run}n does not exist" in capsys.readouterr().err
    out = tmp_path / "a.safetensors"
    assert main(["export", str(run), "--format", "official", "--out", str(out)]) == 1
    assert "a file of this format has a name such as a.pth.tar" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit):
        main(["show", str(run), "again"], prog="dmtjepa")
    error = capsys.readouterr().err
    assert "usage: dmtjepa show" in error
    assert "unrecognized arguments: again" in error


def test_a_file_without_the_part_is_an_error(tmp_path, capsys):
    torch.save({"encoder": {"weight": torch.zeros(2)}}, tmp_path / "a.pth.tar")
    assert main(["export", str(tmp_path / "a.pth.tar"), "--format", "hf", "--out", str(tmp_path / "out")]) == 1
    assert "no weights of target_encoder; it has those of: encoder" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--format", "hf", "--out", str(tmp_path / "out")]) == 1
    assert "holds no config.yaml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", Path(__file__).parents[2] / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hub_entries_load_weights(hubconf, run, images):
    # The run's patches are of 8 pixels, the entry's of 16.
    with pytest.raises(ValueError, match="patches of 8 pixels"):
        hubconf.dmtjepa_vitt16(weights=str(run / "jepa-latest.pth.tar"), image_size=32)
    encoder = hubconf.dmtjepa_vitt16(image_size=32)
    assert encoder(images).shape == (2, 4, 192)
    assert not encoder.training


def test_a_hub_entry_takes_any_architecture_and_patch_size(hubconf, run, images, tmp_path):
    path = run / "jepa-latest.pth.tar"
    encoder = hubconf.dmtjepa_encoder(str(path))
    weights = torch.load(path, weights_only=True)["target_encoder"]
    assert encoder.patch_size == 8
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])
    assert hubconf.dmtjepa_encoder(str(path), image_size=(32, 48)).grid_size == (4, 6)
    assert not encoder.training
    of_run = hubconf.dmtjepa_encoder(str(run))  # a folder, as `dmtjepa.load` takes it
    assert torch.equal(of_run(images), encoder(images))
    wide = Path(shutil.copytree(run, tmp_path / "wide")) / "config.yaml"  # 16 patches, too
    settings = wide.read_text().replace("crop_size: 32", "crop_size: [16, 64]")
    wide.write_text(settings.replace("local_agg_head: true", "local_agg_head: false"))
    assert hubconf.dmtjepa_encoder(str(wide.parent)).grid_size == (2, 8)


@pytest.mark.parametrize(("model_name", "patch_size"), [("vit_nano", 4), ("vit_tiny", 8), ("vit_nano", 14)])
def test_a_hub_entry_builds_any_architecture_without_weights(hubconf, model_name, patch_size):
    encoder = hubconf.dmtjepa(model_name, patch_size, 2 * patch_size)
    width = ARCHITECTURES[model_name]["embed_dim"]
    assert encoder(torch.zeros(1, 3, 2 * patch_size, 2 * patch_size)).shape == (1, 4, width)
    assert not encoder.training


def test_a_hub_entry_by_architecture_takes_weights_and_names_its_architectures(hubconf, run, images):
    encoder = hubconf.dmtjepa("vit_tiny", 8, 32, weights=str(run), part="encoder")
    assert torch.equal(encoder(images), encode(run, "encoder", images))
    with pytest.raises(ValueError, match="model_name 'vit_nanno': choose one of vit_nano"):
        hubconf.dmtjepa("vit_nanno", 8, 32)


def test_hub_entries_take_another_image_size(hubconf, tmp_path):
    torch.save({"target_encoder": hubconf.dmtjepa_vitt16(image_size=64).state_dict()}, tmp_path / "a.pth.tar")
    encoder = hubconf.dmtjepa_vitt16(weights=str(tmp_path / "a.pth.tar"), image_size=32)
    assert encoder.pos_embed.shape == (1, 4, 192)


def test_a_card_names_the_loss_on_visible_patches():
    values = {"data": {"root_path": "images"}, "patch": {"local_agg_head": False}}
    shape, texts = EncoderShape("vit_tiny", 192, 12, 768, 8, 16), []
    for weight in (0.0, 0.5):
        config = parse_config(values | {"optimization": {"context_loss": weight}})
        texts.append(format_card(shape, (32, 32), Origin({}, config), ("target_encoder",), ""))
    assert "I-JEPA (arXiv 2301.08243): the teacher" in texts[0]
    assert "I-JEPA (arXiv 2301.08243) and a loss on the visible patches (arXiv 2603.14482): the teacher" in texts[1]


def test_a_card_says_what_was_exported(run, tmp_path, capsys):
    """Of a run that was evaluated: settings, length, accuracies of this epoch alone. Nothing of this machine."""
    report = run / "report"
    report.mkdir()
    knn = {name: {"5": 0.5, "20": value} for name, value in (("trained", 0.75), ("pixels", 0.25))}
    numbers = {"knn": knn, "linear": {"trained": 0.8}, "segmentation": {"trained": {"mean_iou": 0.4}}}
    data = {"train_images": 50, "validation_images": 100, "classes": 5}
    try:
        (report / "report.json").write_text(json.dumps({"run": {"epoch": 3}, "data": data} | numbers))
        export(run, tmp_path / "hf", "--format", "hf")
        (report / "report.json").write_text(json.dumps({"run": {"epoch": 2}, "data": data} | numbers))
        export(run, tmp_path / "a.safetensors", "--format", "safetensors", "--part", "encoder", "--image-size", "64")
        (report / "report.json").write_text(json.dumps({"run": {"epoch": 3}}))  # of another version
        export(run, tmp_path / "b.safetensors", "--format", "safetensors")
    finally:
        shutil.rmtree(report)
    card = (tmp_path / "hf" / "README.md").read_text()
    front, text = yaml.safe_load(card.split("---\n")[1]), card.split("---\n")[2]
    assert front["library_name"] == "transformers"
    for line in (
        "# vit_tiny, patches of 8",
        'transformers.IJepaModel.from_pretrained("hf")',
        "| epochs | 3 |",
        "| % | k-NN, k = 20 | linear probe | mIoU |",
        "| teacher | 75.0 ± 4.3 | 80.0 ± 4.0 | 40.0 |",
        "| pixels | 25.0 ± 4.3 | - | - |",
    ):
        assert line in text.splitlines()
    assert "DMT-JEPA (arXiv 2405.17995): the teacher. Width 192, 12 blocks. Images of 32x32 pixels." in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["meta"]["pred_emb_dim"] == 48
    assert str(run) not in card
    assert str(tmp_path) not in card

    card = (tmp_path / "a.safetensors.md").read_text()
    assert "the student. Width 192, 12 blocks. Images of 64x64 pixels." in card
    assert "No report of these weights was found" in card
    assert "The report has no accuracies" in (tmp_path / "b.safetensors.md").read_text()
    with pytest.raises(AssertionError):  # what is there is kept
        export(run, tmp_path / "a.safetensors", "--format", "safetensors")


def test_other_weights_in_a_run_folder_are_not_taken_for_its_own(run):
    for name in ("jepa-latest", "jepa-best", "jepa-ep3"):
        assert find_origin(run / f"{name}.pth.tar", {}).config is not None
    for name in ("ijepa-latest", "jepa-ep", "jepa-latest-2"):
        assert find_origin(run / f"{name}.pth.tar", {}).config is None


def test_a_card_of_weights_alone(run, tmp_path):
    export(run, tmp_path / "official" / "a.pth.tar", "--format", "official")
    assert "the teacher and the student" in (tmp_path / "official" / "a.pth.tar.md").read_text()
    export(tmp_path / "official" / "a.pth.tar", tmp_path / "timm", "--format", "timm")
    card = (tmp_path / "timm" / "README.md").read_text()
    assert 'timm.create_model("local-dir:timm", pretrained=True)' in card
    assert "its settings are not known. epochs: 3" in card
