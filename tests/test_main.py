"""`main.py` as a new user gets it wrong: a clear message, an exit code that is not 0, and nothing written."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from dmtjepa.config import ConfigError, load_config, parse_config
from dmtjepa.data.loaders.pil import PilLoader
from dmtjepa.models import ARCHITECTURES
from dmtjepa.run_folder import RunFolder, RunFolderError
from dmtjepa.training.check import build_model_for, check_dry_run, check_space
from dmtjepa.training.compiler import _find_default_cache, check_compiler

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def write_images(folder: Path) -> Path:
    """A folder of 6 images."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images")


def call_main(monkeypatch, run_folder: Path, *arguments: str, fname: str = QUICKSTART, devices=("cpu",)) -> int:
    command = ["main.py", "--fname", fname, "--devices", *devices, f"logging.folder={run_folder}", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    return main.main()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("data.batch_size=4") -> exit code and standard error of main.py, writing to tmp_path/run."""
    monkeypatch.setenv("DMTJEPA_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str, **options) -> tuple[int, str]:
        code = call_main(monkeypatch, tmp_path / "run", *arguments, **options)
        return code, capsys.readouterr().err

    return call


def on_folder(folder: Path, *more: str) -> list[str]:
    return ["data.dataset=folder", f"data.root_path={folder}", "data.num_workers=0", "data.loader=pil", *more]


def short_run(folder: Path, *more: str) -> list[str]:
    """The settings of a run of 3 steps."""
    short = ("data.batch_size=2", "meta.pred_depth=1", "optimization.epochs=1", "optimization.warmup=0")
    return on_folder(folder, *short, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with `images` and `run`, a run on them that has ended; see `copy_of_run`."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        assert call_main(patch, folder / "run", *short_run(write_images(folder / "images"))) == 0
    return folder


@pytest.fixture
def copy_of_run(finished, tmp_path) -> Path:
    """The images of a run that has ended, which `run` would continue. Both are copies."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "images"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.batchsize=4"], ["data.batchsize: unknown key; did you mean batch_size?"]),
        (["data.batch_size=many"], ["ConfigError: the command line:\n  data.batch_size: "]),
        (["data.crop_size=4"], ["data.crop_size", "smaller than a patch"]),
        (["data.crop_size=8"], ["patch.patch_k_size", "larger than the grid of 1x1"]),
        (["mask.min_keep=30"], ["min_keep 30", "lower mask.min_keep"]),
        (["data.dataset=folder"], ["data.root_path", "shapes"]),
        (on_folder(Path("/nowhere/at/all")), ["/nowhere/at/all", "does not exist", "data.root_path"]),
    ],
)  # fmt: skip
def test_wrong_settings(run, tmp_path, arguments, words):
    code, error = run(*arguments)
    assert code == 1
    for word in words:
        assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_settings_file(run):
    code, error = run(fname=QUICKSTART.replace("quickstart", "quickstrat"))
    assert code == 1
    assert "did you mean" in error
    assert "quickstart.yaml" in error


def test_empty_folder(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, error = run(*on_folder(tmp_path / "empty"))
    assert code == 1
    assert str(tmp_path / "empty") in error
    assert ".jpg" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.batch_size=8"], ["the batch is larger than the data set", "6 images"]),
        (["data.batch_size=2", "runtime.accumulation=9"], ["6", "lower runtime.accumulation"]),
    ],
)
def test_batch_larger_than_the_data_set(run, images, arguments, words):
    code, error = run(*on_folder(images, *arguments))
    assert code == 1
    for word in words:
        assert word in error


def test_a_device_that_is_none(run):
    code, error = run(devices=("cpu", "gpu:0"))
    assert code == 1
    assert "write cpu, cuda or cuda:N" in error
    code, error = run("--dry-run", devices=("gpu",))
    assert code == 1
    assert "DeviceError: device 'gpu'" in error


def test_unknown_argument(run, capsys):
    with pytest.raises(SystemExit) as error:
        run("--gpus", "3")
    assert error.value.code == 2
    assert "section.key=value" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(run, tmp_path):
    code, error = run(devices=("cuda:0",))
    assert code == 1
    assert "cuda:0" in error
    assert "no usable CUDA device; use cpu instead" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_with_another_run_is_left_alone(run, copy_of_run, tmp_path):
    before = contents(tmp_path / "run")
    code, error = run(*short_run(copy_of_run, "optimization.lr=0.5"))
    assert code == 1
    assert "optimization.lr" in error
    assert "Traceback" not in error
    assert contents(tmp_path / "run") == before
    # The same settings again: the run is complete, and stays as it is.
    code, error = run(*short_run(copy_of_run))
    assert code == 0
    assert "step 3 of 3" in error


@pytest.mark.slow
def test_a_start_that_fails_leaves_nothing_behind(run, images, tmp_path):
    """The corrected command starts, and the settings in the folder are its own."""
    code, error = run(*short_run(images.with_name("imgaes")))
    assert code == 1
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    code, error = run(*short_run(images))
    assert code == 0, error
    assert load_config(tmp_path / "run" / "config.yaml").data.root_path == str(images)


@pytest.mark.slow
def test_a_moved_data_set_is_followed(run, copy_of_run, finished, tmp_path):
    code, error = run(*short_run(copy_of_run))
    assert code == 0, error
    assert load_config(tmp_path / "run" / "config.yaml").data.root_path == str(copy_of_run)
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert starts[-1]["changed_settings"]["data.root_path"] == {
        "from": str(finished / "images"),
        "to": str(copy_of_run),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["mask.min_keep=30"], "min_keep"),
        (["meta.pred_emb_dim=31"], "pred_emb_dim"),
        (["data.image_folder=imgaes"], "imgaes"),
        (["data.batch_size=8"], "larger than the data set"),
        (["runtime.accumulation=9"], "lower runtime.accumulation"),
        (["meta.load_checkpoint=true", "meta.read_checkpoint=nowhere.pth.tar"], "nowhere.pth.tar"),
        (["meta.load_checkpoint=true", "meta.read_checkpoint=FILE"], "damaged.pth.tar"),
        (["data.root_path=$NOT_SET/images"], "$NOT_SET"),
        (["runtime.shard_size=2"], "shard_size"),
    ],
)
def test_dry_run_says_what_a_start_says(run, images, tmp_path, arguments, word):
    file = tmp_path / "damaged.pth.tar"
    file.write_bytes(b"PK\3\4 and no more")
    arguments = [text.replace("FILE", str(file)) for text in on_folder(images, "data.batch_size=2", *arguments)]
    dry, dry_error = run("--dry-run", *arguments)
    wet, wet_error = run(*arguments)
    assert (dry, wet) == (1, 1)
    assert dry_error.splitlines()[-1] == wet_error.splitlines()[-1]
    assert word in wet_error
    assert "Traceback" not in dry_error + wet_error
    assert not (tmp_path / "run").exists()


def refuse_alike(run, arguments, message):
    """A dry run and a start say the same."""
    code, dry_error = run("--dry-run", *arguments)
    assert code == 1
    code, error = run(*arguments)
    assert code == 1
    assert re.search(message, error)
    assert dry_error[dry_error.index("CheckpointError") :] == error[error.index("CheckpointError") :]


@pytest.mark.slow
def test_dry_run_of_a_started_run(run, copy_of_run, tmp_path, monkeypatch):
    small = short_run(copy_of_run)
    before = contents(tmp_path / "run")
    assert run("--dry-run", *small)[0] == 0
    code, error = run("--dry-run", *short_run(copy_of_run, "optimization.lr=0.5"))
    assert code == 1
    assert "optimization.lr" in error
    for index in range(3):
        shutil.copy(copy_of_run / "0.jpg", copy_of_run / f"more{index}.jpg")
    code, error = run("--dry-run", *short_run(copy_of_run))
    assert code == 1
    assert "the data set has changed" in error
    for index in range(3):
        (copy_of_run / f"more{index}.jpg").unlink()
    (copy_of_run / "0.jpg").rename(copy_of_run / "z.jpg")
    refuse_alike(run, small, r"CheckpointError: .*1 added \(z\.jpg\), 1 removed \(0\.jpg\)\. Restore it, or set")
    (copy_of_run / "z.jpg").rename(copy_of_run / "0.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(PilLoader, "name", "dali")
        refuse_alike(run, small, r"the loader: pil there, dali now")
    with monkeypatch.context() as patch:
        patch.setitem(ARCHITECTURES["vit_nano"], "mlp_ratio", 2.0)
        refuse_alike(run, small, r"does not fit this run: model\.encoder\.blocks\.0\.mlp\.fc1\.weight is")
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{")
    refuse_alike(run, small, "are damaged")
    for file in copy_of_run.iterdir():
        file.write_bytes(b"bad")
    code, error = run("--dry-run", *small)
    assert code == 1
    assert "images that were tried cannot be decoded" in error
    assert before.keys() == contents(tmp_path / "run").keys()


@pytest.mark.parametrize(
    ("variable", "device_type", "setting", "words"),
    [
        ("CXX", "cpu", {"compile": "on"}, r"runtime\.compile: there is no C\+\+ compiler \(g\+\+\)"),
        ("CC", "cuda", {}, r"runtime\.kernels: triton needs a C compiler \(gcc or clang\)"),
    ],
)
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, variable, device_type, setting, words):
    config = parse_config({"runtime": setting})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=words):
        check_compiler(config, device_type)
    (tmp_path / "compiler").write_text("#!/bin/sh\n")
    (tmp_path / "compiler").chmod(0o755)
    monkeypatch.setenv(variable, "compiler")
    check_compiler(config, device_type)
    monkeypatch.delenv(variable)
    check_compiler(parse_config({"runtime": {"compile": "off", "kernels": "torch"}}), device_type)


def make_cache_unusable(how, tmp_path, monkeypatch):
    """The name of a folder that programs cannot be written into, whoever runs this, and the reason in the message."""
    (tmp_path / "file").touch()
    if how == "below a file":
        return str(tmp_path / "file" / "cache"), "Not a directory"
    if how == "in /proc":
        return "/proc/cache", "No such file or directory"
    if how == "no name":
        return "", "Not a directory"
    flags = os.ST_NOEXEC
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((0,) * 8 + (flags, 255)))
    return str(tmp_path / "cache"), "mounted without permission to run programs"


@pytest.mark.parametrize("how", ["below a file", "in /proc", "no name", "noexec"])
@pytest.mark.parametrize(
    ("device_type", "variable", "setting"),
    [("cpu", "TORCHINDUCTOR_CACHE_DIR", "runtime.compile"), ("cuda", "TRITON_CACHE_DIR", "runtime.kernels")],
)
def test_a_compiler_cache_that_cannot_be_used_is_named(monkeypatch, tmp_path, how, device_type, variable, setting):
    compile_setting = "on" if device_type == "cpu" else "off"
    config = parse_config({"runtime": {"compile": compile_setting}})
    monkeypatch.setattr(shutil, "which", lambda _: "compiler")
    monkeypatch.setenv(variable, str(tmp_path / "a" / "b"))
    check_compiler(config, device_type)
    assert list(tmp_path.iterdir()) == []  # nothing is left
    name, reason = make_cache_unusable(how, tmp_path, monkeypatch)
    if name or device_type == "cpu":  # Triton takes its default instead of an empty name
        monkeypatch.setenv(variable, name)
        with pytest.raises(ConfigError, match=rf"^{setting}: .*{reason}.* variable {variable} name a folder"):
            check_compiler(config, device_type)
    check_compiler(parse_config({"runtime": {"compile": "off", "kernels": "torch"}}), device_type)


def test_a_default_compiler_cache_that_cannot_be_used_is_named(monkeypatch, tmp_path):
    # Its first import makes the cache. One that fails halfway, as it would below, cannot be repeated in a process.
    importlib.import_module("torch._inductor.runtime.cache_dir_utils")
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: "compiler")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"file/torchinductor_\w+, cannot be used: .*TORCHINDUCTOR_CACHE_DIR"):
        check_compiler(parse_config({"runtime": {"compile": "on"}}), "cpu")

    def unknown():
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", unknown)
    with pytest.raises(ConfigError, match=r"there is no place for its cache: .*uid not found"):
        check_compiler(parse_config({"runtime": {"compile": "on"}}), "cpu")


def test_compiled_headers_need_the_default_compiler_cache(monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds to import

    monkeypatch.setattr("getpass.getuser", lambda: "a/user:name")
    assert _find_default_cache() == default_cache_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda _: "compiler")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"file/torchinductor_\w+, cannot be used: .* variable TMPDIR name a folder"):
        check_compiler(parse_config({"runtime": {"compile": "on"}}), "cpu")


@pytest.fixture
def folder_of_all():
    """A folder that every user can write to. The folders above `tmp_path` are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@contextlib.contextmanager
def not_root():
    """Run as another user than root: root can write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("part", "written"),
    [("ab/", True), ("fxgraph/ab/", True), ("locks/ab.lock", True), ("fxgraph/ab/key/", False), ("ab/ab.so", False)],
)
def test_parts_of_a_compiler_cache_that_another_user_has_made_are_named(monkeypatch, folder_of_all, part, written):
    config = parse_config({"runtime": {"compile": "on"}})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder_of_all))
    monkeypatch.setattr(shutil, "which", lambda _: "compiler")
    monkeypatch.setattr("tempfile.tempdir", str(folder_of_all / "default"))
    check_compiler(config, "cpu")
    path = folder_of_all / part
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in path.parents[: len(Path(part).parts) - 1]:
        folder.chmod(0o777)
    if part.endswith("/"):
        path.mkdir()
        path.chmod(0o555)
    else:
        path.touch()
        path.chmod(0o444)
    with not_root():
        if written:
            named = rf"{path}, of the user \w+, cannot be written to.* variable TORCHINDUCTOR_CACHE_DIR"
            with pytest.raises(ConfigError, match=named):
                check_compiler(config, "cpu")
        else:  # other files are only read, or replaced
            check_compiler(config, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_start_needs_a_compiler_cache_before_anything_is_computed(run, images, tmp_path, monkeypatch, option):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/cache")
    code, error = run(*option, *on_folder(images, "data.batch_size=2", "runtime.compile=on"))
    assert code == 1
    assert error.splitlines()[-1].startswith(
        "ConfigError: runtime.compile: the cache of compiled programs, /proc/cache"
    )
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    config = parse_config({"logging": {"folder": str(tmp_path / "run")}, "meta": {"model_name": "vit_nano"}})
    folder = RunFolder.from_config(config)
    with torch.device("meta"):
        model = build_model_for(config, "cpu")
    check_space(folder, model)
    # Float32 numbers: student and teacher, and two averages of the student.
    values = sum(parameter.numel() * (3 if parameter.requires_grad else 1) for parameter in model.parameters())
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 4 * values - 1))
    with pytest.raises(RunFolderError, match=r"room for \d+\.\d MiB, and a checkpoint takes \d+\.\d MiB"):
        check_space(folder, model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 5 * values))
    check_space(folder, model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    check_space(folder, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fname", "devices", "lines"),
    [
        ("in1k_vitb16_ep600", ["cpu", "cpu"], ["effective batch    6 = 3 x 2 processes x 1 accumulated", "GFLOP"]),
        ("quickstart", ["cuda:0", "cuda:1"], ["processes          2 (cuda)"]),  # needs no GPU
    ],
)
def test_dry_run_starts_nothing(monkeypatch, capsys, images, tmp_path, fname, devices, lines):
    arguments = on_folder(images, "data.batch_size=3", "data.image_folder=''")
    fname = str(ROOT / "configs" / f"{fname}.yaml")
    code = call_main(monkeypatch, tmp_path / "run", "--dry-run", *arguments, fname=fname, devices=devices)
    printed, error = capsys.readouterr()
    assert code == 0, error
    for line in lines:
        assert line in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_dry_run_for_gpus_that_are_not_here(images, tmp_path):
    """It names them, checks what the settings tell of them, and says what it cannot know."""
    changes = on_folder(images, "data.batch_size=3", "data.image_folder=''", f"logging.folder={tmp_path / 'run'}")
    config = load_config(QUICKSTART, changes)
    text = check_dry_run(config, 2, ["cuda:0", "cuda:1"])
    assert "\ndevice  2 x GPU (not on this machine), bfloat16, compiled\n" in text
    assert text.splitlines()[-1] == (
        "this machine has no cuda:0, cuda:1. Not checked: the C compiler and its cache, "
        "whether its memory suffices for the estimate above"
    )
    assert "Not checked" not in check_dry_run(config, 2, ["cpu", "cpu"])
    narrow = load_config(QUICKSTART, [*changes, "runtime.attention=xformers", "meta.pred_emb_dim=36"])
    with pytest.raises(ConfigError, match="xformers has no kernel for heads of 18 channels"):
        check_dry_run(narrow, 1, ["cuda"])
    check_dry_run(narrow, 1, ["cpu"])
    with pytest.raises(ConfigError, match=r"runtime\.cuda_graphs: on needs one process, and there are 2"):
        check_dry_run(load_config(QUICKSTART, [*changes, "runtime.cuda_graphs=on"]), 2, ["cuda:0", "cuda:1"])


@pytest.mark.slow
def test_dry_run_tells_what_a_run_needs(monkeypatch, capsys):
    """Even where the images are not, as on a login node; but the exit status tells that a start would fail."""
    fname = str(ROOT / "configs" / "in1k_vith14_ep300.yaml")
    monkeypatch.delenv("DATASETS", raising=False)
    monkeypatch.setattr(sys, "argv", ["main.py", "--fname", fname, "--devices", "cpu", "--dry-run"])
    assert main.main() == 1
    printed, error = capsys.readouterr()
    for word in ("effective batch", "learning rate", "parameters", "FLOPs per image", "memory of a device"):
        assert word in printed
    assert load_config(fname).meta.model_name in printed
    assert "data.root_path: $DATASETS contains $DATASETS" in error
