"""Weights by the name of a repository of Hugging Face, from a cache as huggingface_hub leaves it, without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dmtjepa
from dmtjepa.config import parse_config
from dmtjepa.evaluation.subject import find_subject
from dmtjepa.interop import WeightsError
from dmtjepa.interop.hub import find_hub_name
from dmtjepa.interop.sources import find_initial_weights
from dmtjepa.models import ARCHITECTURES, VisionTransformer
from dmtjepa.run_folder import RunFolder

NAME = "someone/ijepa_nano"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of Hugging Face, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def fill(cache: Path, *, weights: bool = True, image_size: int = 32) -> Path:
    """Put an encoder into the cache as huggingface_hub does; returns the folder of its files."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (folder / "config.json").write_text(json.dumps({"model_args": {"num_heads": 2}}))
    if weights:
        torch.manual_seed(0)
        model = VisionTransformer(image_size, 8, **ARCHITECTURES["vit_nano"])
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def start_from(name: str) -> Path | None:
    config = parse_config({"meta": {"load_checkpoint": True, "read_checkpoint": name}})
    return find_initial_weights(config, RunFolder(Path("runs/mine"), "jepa"))


def test_a_name_is_found_in_the_cache(cache):
    folder = fill(cache)
    assert dmtjepa.load(NAME).features(torch.zeros(1, 3, 32, 32)).patches.shape == (1, 16, 128)
    assert dmtjepa.load(f"hf-hub:{NAME}").image_size == (32, 32)
    assert start_from(NAME) == folder / "model.safetensors"


def test_weights_by_name_are_measured_into_a_folder_here(cache):
    fill(cache)
    subject = find_subject(Path(NAME), has_images=True)
    assert subject.out == Path("someone_ijepa_nano-report")
    assert (subject.name, subject.run) == (NAME, None)
    assert subject.config.grid_size == (4, 4)  # as that of quickstart
    with pytest.raises(ValueError, match=r"there is no file or folder .*give data a folder of images"):
        find_subject(Path(NAME), has_images=False)


def test_a_grid_without_masks_is_explained(cache):
    fill(cache, image_size=16)
    with pytest.raises(ValueError, match=r"2x2 patches.*too small for masks|too small for masks.*2x2 patches"):
        find_subject(Path(NAME), has_images=True)


def test_what_is_not_in_the_cache_says_how_to_get_it(cache):
    fill(cache, weights=False)
    for name in (NAME, "facebook/ijepa_vith14_1k"):
        with pytest.raises(WeightsError, match=f"hf download {name} config.json model.safetensors") as raised:
            dmtjepa.load(name)
        assert f"no file or folder {name}" in str(raised.value)
        assert str(cache) in str(raised.value)
    with pytest.raises(WeightsError, match="hf download facebook/ijepa_vith14_1k"):
        start_from("facebook/ijepa_vith14_1k")


def test_without_the_package_the_remedy_is_to_install_it(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="pip install huggingface_hub"):
        dmtjepa.load(NAME)


def test_paths_are_not_taken_for_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "mine", "/runs/mine", "../runs/mine", "a/b/c", "weights/jepa-latest.pth.tar", "~/mine"):
        assert find_hub_name(Path(path)) is None, path
    assert find_hub_name(Path("timm/vit_huge_patch14_gap_224.in1k_ijepa")) == "timm/vit_huge_patch14_gap_224.in1k_ijepa"
    assert find_hub_name(Path("hf-hub:runs/mine")) == "runs/mine"


@pytest.mark.slow  # imports timm
def test_models_of_timm_need_no_owner(cache):
    timm = pytest.importorskip("timm")
    names = timm.list_models("*ijepa*", pretrained=True)
    assert names
    for name in names:
        assert find_hub_name(Path(name)) == f"timm/{name}"
    with pytest.raises(WeightsError, match=f"hf download timm/{names[0]}"):
        dmtjepa.load(names[0])
    with pytest.raises(WeightsError, match=f"hf download timm/{names[0]}"):
        start_from(names[0])
