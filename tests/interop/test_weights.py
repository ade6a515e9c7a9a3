import os
import pickle
import re
import warnings

import pytest
import torch

from dmtjepa.cli.weights import summarize
from dmtjepa.interop import (
    WeightsError,
    build_encoder,
    describe_encoder,
    get_part,
    load_model,
    load_weights,
    read_checkpoint,
)
from dmtjepa.models import AggregationHead, Predictor, VisionTransformer
from dmtjepa.models.layers import resample_position_embedding
from dmtjepa.models.vit import ARCHITECTURES
from dmtjepa.objective import DMTJEPA

TINY = ARCHITECTURES["vit_tiny"]


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return VisionTransformer(32, 8, **TINY)


def save_official(path, **parts):
    """A file as the official ones: names prefixed with `module.`, numbers beside the parts."""
    state = {name: {f"module.{key}": value for key, value in part.items()} for name, part in parts.items()}
    torch.save(state | {"opt": {"state": {}, "param_groups": []}, "scaler": None, "epoch": 300, "lr": 1e-6}, path)


def test_official_files_load_by_name(encoder, tmp_path):
    predictor = Predictor((4, 4), 192, 48, depth=1, num_heads=3)
    save_official(tmp_path / "a.pth.tar", encoder=encoder.state_dict(), predictor=predictor.state_dict())
    checkpoint = read_checkpoint(tmp_path / "a.pth.tar")
    assert checkpoint["epoch"] == 300
    torch.manual_seed(1)
    for part, other in (
        ("encoder", VisionTransformer(32, 8, **TINY)),
        ("predictor", Predictor((4, 4), 192, 48, depth=1, num_heads=3)),
    ):
        load_weights(other, get_part(checkpoint, part, "a.pth.tar"), "a.pth.tar")
        own = {"encoder": encoder, "predictor": predictor}[part].state_dict()
        assert all(torch.equal(value, own[name]) for name, value in other.state_dict().items())


def test_parameter_names_are_the_official_ones(encoder):
    """Written down here from the official checkpoints: names are what makes them load."""
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    names = {"pos_embed"} | {f"{n}.{k}" for n in ("patch_embed.proj", "norm") for k in ("weight", "bias")}
    names |= {f"blocks.{i}.{n}.{k}" for i in range(12) for n in block for k in ("weight", "bias")}
    assert set(encoder.state_dict()) == names
    predictor = {"mask_token", "predictor_pos_embed"}
    predictor |= {
        f"{n}.{k}" for n in ("predictor_embed", "predictor_norm", "predictor_proj") for k in ("weight", "bias")
    }
    predictor |= {f"predictor_blocks.0.{n}.{k}" for n in block for k in ("weight", "bias")}
    assert set(Predictor((4, 4), 192, 48, depth=1, num_heads=3).state_dict()) == predictor
    block = ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    head = {f"cls_blocks.{i}.{n}.{k}" for i in range(2) for n in block for k in ("weight", "bias")}
    assert set(AggregationHead(192, 3).state_dict()) == head | {"norm.weight", "norm.bias"}


def test_sizes_are_read_from_shapes(encoder):
    shape = describe_encoder(encoder.state_dict())
    assert (shape.model_name, shape.depth, shape.patch_size, shape.num_patches) == ("vit_tiny", 12, 8, 16)
    assert "vit_tiny" in str(shape)
    assert "32x32" in str(shape)
    giant = {
        "patch_embed.proj.weight": torch.empty(1408, 3, 16, 16, device="meta"),
        "pos_embed": torch.empty(1, 196, 1408, device="meta"),
        "blocks.0.mlp.fc1.weight": torch.empty(6144, 1408, device="meta"),
        "blocks.39.mlp.fc1.weight": torch.empty(6144, 1408, device="meta"),
    }
    assert describe_encoder(giant).model_name == "vit_giant"


def test_an_encoder_is_built_from_its_weights_alone(encoder):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    built = build_encoder({f"module.{k}": v for k, v in encoder.state_dict().items()}, "file")
    torch.testing.assert_close(built(images), encoder(images), rtol=0, atol=0)
    assert not built.training


def test_oblong_images_need_their_size(tmp_path):
    encoder = VisionTransformer((32, 48), 8, **TINY)
    with pytest.raises(WeightsError, match="give the image size"):
        build_encoder(encoder.state_dict(), "file")
    assert build_encoder(encoder.state_dict(), "file", image_size=(32, 48)).grid_size == (4, 6)


def test_another_model_is_explained_and_nothing_is_changed(encoder):
    other = VisionTransformer(32, 16, **ARCHITECTURES["vit_small"])
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(other, encoder.state_dict(), "tiny.pth.tar")
    text = str(caught.value)
    assert re.search(r"the file holds vit_tiny with patches of 8 pixels and 16 positions \(.*32x32", text)
    assert re.search(r"the model is vit_small with patches of 16 pixels and 4 positions", text)
    assert "meta.model_name, mask.patch_size, data.crop_size and data.channels" in text
    assert "patch_embed.proj.weight is [192, 3, 8, 8], the model's is [384, 3, 16, 16]" in text
    assert re.search(r"and \d+ more", text)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_missing_and_unexpected_names_are_listed(encoder):
    weights = dict(encoder.state_dict())
    del weights["blocks.3.attn.qkv.weight"]
    weights["cls_token"] = torch.zeros(1, 1, 192)
    before = encoder.norm.weight.clone()
    weights["norm.weight"] = torch.full((192,), 7.0)
    with pytest.raises(WeightsError) as caught:
        load_weights(encoder, weights, "file")
    assert "missing: blocks.3.attn.qkv.weight\n" in str(caught.value)
    assert "unexpected: cls_token" in str(caught.value)
    assert torch.equal(encoder.norm.weight, before)


def test_a_missing_part_names_those_that_are_there(encoder, tmp_path):
    save_official(tmp_path / "a.pth.tar", encoder=encoder.state_dict(), target_encoder=encoder.state_dict())
    checkpoint = read_checkpoint(tmp_path / "a.pth.tar")
    with pytest.raises(
        WeightsError, match="no weights of target_head; it has those of: encoder, target_encoder; official"
    ):
        get_part(checkpoint, "target_head", "a.pth.tar")


def make_model(seed, head=True):
    torch.manual_seed(seed)
    encoder = VisionTransformer(32, 8, **TINY)
    return DMTJEPA(encoder, Predictor((4, 4), 192, 48, depth=1, num_heads=3), AggregationHead(192, 3) if head else None)


def parts_of(model):
    parts = {"encoder": model.encoder, "predictor": model.predictor, "target_encoder": model.teacher_encoder}
    if model.head is not None:
        parts |= {"head": model.head, "target_head": model.teacher_head}
    return {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}


def changed_parts(model, before):
    return {
        name
        for name, part in parts_of(model).items()
        if any(not torch.equal(value, before[name][key]) for key, value in part.items())
    }


def test_a_model_starts_from_a_checkpoint(tmp_path):
    source, model = make_model(0), make_model(1)
    source.update_teacher(0.5)
    save_official(tmp_path / "a.pth.tar", **parts_of(source))
    assert load_model(model, tmp_path / "a.pth.tar") == []
    assert changed_parts(model, parts_of(source)) == set()


def test_heads_that_an_official_file_lacks_are_named_and_kept(tmp_path):
    model = make_model(1)
    before = parts_of(model)
    save_official(tmp_path / "a.pth.tar", **parts_of(make_model(0, head=False)))
    assert load_model(model, tmp_path / "a.pth.tar") == ["head", "target_head"]
    assert changed_parts(model, before) == {"encoder", "predictor", "target_encoder"}


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", ["target_encoder", "target_head"])
def test_a_model_is_started_whole_or_not_at_all(tmp_path, spoiled):
    model = make_model(1)
    before = parts_of(model)
    parts = parts_of(make_model(0))
    del parts[spoiled]["norm.bias"]
    save_official(tmp_path / "a.pth.tar", **parts)
    with pytest.raises(WeightsError, match=rf"(?s){spoiled} of .*missing: norm\.bias"):
        load_model(model, tmp_path / "a.pth.tar")
    del parts[spoiled]
    save_official(tmp_path / "b.pth.tar", **parts)
    with pytest.raises(WeightsError, match=f"no weights of {spoiled}"):
        load_model(model, tmp_path / "b.pth.tar")
    assert changed_parts(model, before) == set()


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.getpid, ())

    torch.save({"encoder": Evil()}, tmp_path / "a.pth.tar")
    with pytest.raises(WeightsError, match=r"cannot be read as a checkpoint of tensors: .*posix\.getpid, which is not"):
        read_checkpoint(tmp_path / "a.pth.tar")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none.pth.tar")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth.tar")
    with pytest.raises(WeightsError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "tensor.pth.tar")
    (tmp_path / "empty.pth.tar").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"empty\.pth\.tar \(0 bytes\) cannot be read"):
        read_checkpoint(tmp_path / "empty.pth.tar")
    with pytest.raises(WeightsError, match=f"{tmp_path} is a folder; give a .pth.tar file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.pth.tar", b"", "it is empty"),
        ("a.html", b"<html>", "it is not a PyTorch file. Weights are .pth.tar or .safetensors files"),
        ("a.txt", b"hi", "it is not a PyTorch file"),
        ("a.onnx", b"\x08\x0a", "it is a program for ONNX; name what it was exported from"),
        ("a.pt2", b"PK\x03\x04", "it is a program for torch.export; name"),
        ("a.pkl", pickle.dumps({"a": 1}), "it holds something other than tensors and numbers"),
        ("a.tar", b"PK\x03\x04", "PytorchStreamReader failed reading zip archive: "),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, name, data, reason):
    """In words of our own: those of PyTorch advise to run the code in a file."""
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about other pickles than its own
        with pytest.raises(WeightsError) as error:
            read_checkpoint(tmp_path / name)
    assert f"({len(data)} bytes) cannot be read as a checkpoint of tensors: {reason}" in str(error.value)
    assert "weights_only" not in str(error.value)


def test_tensors_of_no_part_are_told(tmp_path):
    torch.save({"a.weight": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "a.pth.tar")
    checkpoint = read_checkpoint(tmp_path / "a.pth.tar")
    with pytest.raises(WeightsError, match=r"of: none\. 2 tensors belong to no part, such as a\.weight"):
        get_part(checkpoint, "target_encoder", "a.pth.tar")
    assert summarize(checkpoint) == "  2 tensors of no part, such as a.weight"
    assert summarize({"encoder": {"a": torch.zeros(2)}}) == "  encoder: 0.0 M values in 1 tensors"
    with pytest.raises(WeightsError, match=r"^a\.pth\.tar holds no encoder of I-JEPA, but a\.weight, b"):
        describe_encoder(checkpoint, "a.pth.tar")


def test_files_of_old_versions_of_pytorch_are_read(tmp_path):
    torch.save({"encoder": {"a": torch.arange(3.0)}}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pth.tar")["encoder"]["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(tmp_path, zipped, share):
    path = tmp_path / "a.pth.tar"
    torch.save({"encoder": {"a": torch.ones(100, 100)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(WeightsError, match=r"a\.pth\.tar \(\d+ bytes\) cannot be read as a checkpoint of tensors"):
        read_checkpoint(path)


def test_position_embeddings_of_another_size_are_resampled(encoder, caplog):
    """An encoder made for another size gives what the original gives for images of that size."""
    images = torch.randint(256, (2, 3, 64, 48), dtype=torch.uint8)
    larger = build_encoder(encoder.state_dict(), "small.pth.tar", image_size=(64, 48))
    assert larger.pos_embed.shape == (1, 48, 192)
    torch.testing.assert_close(larger(images), encoder(images))
    assert "small.pth.tar: the position embedding (pos_embed) is made for 4x4 patches" in caplog.text
    assert "resampled to 8x6" in caplog.text


def test_a_model_of_another_size_starts_from_a_checkpoint(tmp_path, caplog):
    source = make_model(0)
    save_official(tmp_path / "a.pth.tar", **parts_of(source))
    torch.manual_seed(1)
    model = DMTJEPA(
        VisionTransformer(64, 8, **TINY), Predictor((8, 8), 192, 48, depth=1, num_heads=3), AggregationHead(192, 3)
    )
    load_model(model, tmp_path / "a.pth.tar")
    assert torch.equal(model.encoder.blocks[3].attn.qkv.weight, source.encoder.blocks[3].attn.qkv.weight)
    for position, given in (
        (model.encoder.pos_embed, source.encoder.pos_embed),
        (model.teacher_encoder.pos_embed, source.encoder.pos_embed),
        (model.predictor.predictor_pos_embed, source.predictor.predictor_pos_embed),
    ):
        torch.testing.assert_close(position[0], resample_position_embedding(given[0], (4, 4), (8, 8)))
    assert caplog.text.count("resampled to 8x8") == 3


def test_position_embeddings_of_oblong_grids_are_not_resampled():
    weights = VisionTransformer((32, 48), 8, **TINY).state_dict()
    with pytest.raises(WeightsError, match=r"pos_embed is \[1, 24, 192\], the model's is \[1, 64, 192\]"):
        build_encoder(weights, "file", image_size=64)
