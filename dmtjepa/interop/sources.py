"""Where weights are: what may be named in their place, and the file or folder that is meant."""

from __future__ import annotations

import difflib
from pathlib import Path

from dmtjepa.checkpoint_format import CheckpointError, find_fault, is_checkpoint, newest_whole, read_meta
from dmtjepa.config import Config, ConfigError, expand_path, parse_config
from dmtjepa.interop.encoder_file import find_encoder_file
from dmtjepa.interop.errors import WeightsError
from dmtjepa.interop.hub import download, find_hub_name
from dmtjepa.run_folder import RunFolder, RunFolderError, open_run


def find_source(source: Path) -> Path:
    """What to read: a `.pth.tar` or `model.safetensors` file, or a checkpoint folder.

    Args:
        source: one of these, a run folder (see `find_weights_of_run`), a folder of Hugging Face or timm, or the name
            of a repository of Hugging Face.

    Raises:
        WeightsError: there is no such file or folder, or the repository cannot be downloaded.
        CheckpointError: the checkpoint folder is damaged.
        RunFolderError: the folder is none of these.
    """
    if not source.exists() and (name := find_hub_name(source)) is not None:
        return download(name)
    check_exists(source)
    if not source.is_dir():
        return source
    if not is_checkpoint(source):
        encoder_file = find_encoder_file(source)
        if encoder_file is not None:
            return encoder_file
        run, _ = open_run(source)
        return find_weights_of_run(run)
    fault = find_fault(source)
    if fault is not None:
        raise CheckpointError(f"{source} is damaged: {fault}")
    return source


def check_exists(source: Path) -> None:
    """Refuse a path of nothing. Raises WeightsError, which names what is there with a similar name."""
    if source.exists():
        return
    siblings = {path.name: path for path in source.parent.iterdir()} if source.parent.is_dir() else {}
    similar = [siblings[name] for name in difflib.get_close_matches(source.name, siblings, n=1, cutoff=0.8)]
    raise WeightsError(
        f"{source} does not exist. {f'Did you mean {similar[0]}? ' if similar else ''}Give a run folder, a file of "
        "weights, a folder of timm or Hugging Face, or a name such as facebook/ijepa_vith14_1k"
    )


def is_weights(source: Path) -> bool:
    """Whether a path is of weights by themselves: a file, a checkpoint folder, or a folder of Hugging Face or timm.

    Raises:
        WeightsError: see `find_encoder_file`.
    """
    return source.is_file() or (source.is_dir() and (is_checkpoint(source) or find_encoder_file(source) is not None))


def find_run_of(weights: Path) -> Path | None:
    """The run folder that holds a file of weights or a checkpoint folder, or None if there is none."""
    folder = weights.parent.parent if is_checkpoint(weights) else weights.parent
    return folder if RunFolder(folder, tag="").config_file.is_file() else None


def find_weights_of_run(run: RunFolder) -> Path:
    """The latest export of a run, or its newest checkpoint if it was stopped before it had written an export.

    Raises:
        CheckpointError: there is no export, and all checkpoints are damaged.
    """
    if run.latest_export.exists():
        return run.latest_export
    return newest_whole(run.checkpoints) or run.latest_export  # reading what is not there says what is


def find_image_size(source: Path) -> tuple[int, int] | None:
    """Height and width of the images that were trained on, if settings beside the weights tell them."""
    if not source.is_dir():
        return None
    if is_checkpoint(source):
        return parse_config(read_meta(source).get("config", {}), source=str(source)).data.image_size
    if find_encoder_file(source) is not None:
        return None
    _, config = open_run(source)
    return config.data.image_size


def find_initial_weights(config: Config, folder: RunFolder) -> Path | None:
    """The file that a new run starts from: `meta.read_checkpoint` by itself or below the run folder.

    For a run folder its latest weights, for a folder of Hugging Face or timm the file of weights in it, and for the
    name of a repository of Hugging Face that file from there.

    Raises:
        WeightsError: the repository cannot be downloaded.
        ConfigError: it is a folder of none of these.
    """
    if not config.meta.load_checkpoint or config.meta.read_checkpoint is None:
        return None
    path = Path(expand_path(config.meta.read_checkpoint, "meta.read_checkpoint"))
    if not path.exists() and not (folder.path / path).exists():
        name = find_hub_name(path, (Path(), folder.path))
        if name is not None:
            return download(name)
    path = path if path.exists() else folder.path / path
    if not path.is_dir() or is_checkpoint(path):
        return path
    try:
        return find_source(path)
    except RunFolderError as error:
        raise ConfigError(
            f"meta.read_checkpoint: {path} is no run folder, no checkpoints/step-N folder, and no folder of Hugging "
            "Face or timm"
        ) from error
