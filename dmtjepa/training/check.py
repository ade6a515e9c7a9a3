"""What must be true before a run makes its first step. Nothing here writes: a start that is refused leaves no trace."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch

from dmtjepa.checkpoint_format import list_checkpoints, newest_whole, read_meta
from dmtjepa.config import Config, ConfigError, expand_path
from dmtjepa.data import StoredSource, check_batch_fits, check_loader, open_source
from dmtjepa.data.fingerprint import ImageList
from dmtjepa.interop import load_model
from dmtjepa.masks import check_masks
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.run_folder import RunFolder
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.images import compare_images
from dmtjepa.training.parallelize import check_shard_size
from dmtjepa.training.state import check_data_unchanged


def check_start(config: Config, world_size: int, device_type: str) -> StoredSource:
    """Check everything that a start needs. Each rank of a start calls this first, and `--dry-run` calls it, too.

    Args:
        config: of the run.
        world_size: number of processes.
        device_type: `cuda` or `cpu`. What needs a GPU is not checked on a machine without one.

    Returns:
        The images.

    Raises:
        ConfigError, DataError, MaskError, WeightsError: the settings do not allow a single step.
        RunFolderError: the run folder holds another run, or cannot be written to.
    """
    check_settings(config, world_size)
    here = device_type if device_type == "cpu" or torch.cuda.is_available() else "cpu"
    if here == device_type:
        check_compiler(config, device_type)
    folder = RunFolder.from_config(config)
    folder.check(config, config.global_batch(world_size))
    check_loader(config.data)
    source = open_source(config.data)
    check_batch_fits(config.data, len(source), world_size)
    count_steps_per_epoch(config, world_size, len(source))
    with torch.device("meta"):  # shapes alone
        model = build_model_for(config, here)
    weights = find_initial_weights(config, folder)
    if weights is not None and not list_checkpoints(folder.checkpoints):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # nothing is loaded here
            load_model(model, weights)
    return source


def check_settings(config: Config, world_size: int) -> None:
    """Check what depends on no machine: masks, and the number of processes.

    Raises:
        ConfigError, MaskError: the settings do not allow a single step anywhere.
    """
    check_masks(config.mask, config.grid_size)
    check_shard_size(world_size, config.runtime.shard_size)
    with torch.device("meta"):  # shapes alone
        build_model_for(config, "cpu")


def check_dry_run(config: Config, world_size: int, device_type: str) -> None:
    """`check_start`, and what a start checks while it holds the lock of the run folder.

    Raises:
        CheckpointError: all checkpoints are damaged, or the data set has changed; and what `check_start` raises.
    """
    source = check_start(config, world_size, device_type)
    folder = RunFolder.from_config(config)
    folder.check_unlocked()
    checkpoint = newest_whole(folder.checkpoints)
    if checkpoint is not None:
        steps_per_epoch = count_steps_per_epoch(config, world_size, len(source))
        check_data_unchanged(checkpoint, read_meta(checkpoint), steps_per_epoch, len(source))
        loader = None if config.data.loader == "auto" else config.data.loader  # the machine of the run chooses
        compare_images(config, folder, ImageList.of(source), loader, checkpoint)


def check_compiler(config: Config, device_type: str) -> None:
    """Refuse settings that need a compiler where there is none.

    Raises:
        ConfigError: with the program that was not found.
    """
    compiled = ComputePlan.from_config(config, device_type).compiled
    if device_type == "cpu" and compiled:
        given = os.environ.get("CXX")
        if not shutil.which(given or "g++"):
            raise ConfigError(
                f"runtime.compile: there is no C++ compiler ({given or 'g++'}); install it, let the environment "
                "variable CXX name one, or set runtime.compile: off"
            )
    if device_type == "cuda" and (compiled or config.runtime.kernels == "triton"):
        given = os.environ.get("CC")
        if not any(map(shutil.which, [given] if given else ["gcc", "clang"])):
            raise ConfigError(
                f"runtime.kernels: triton needs a C compiler ({given or 'gcc or clang'}); install it, let the "
                "environment variable CC name one, or set runtime.kernels: torch and runtime.compile: off"
            )


def count_steps_per_epoch(config: Config, world_size: int, num_images: int) -> int:
    """Optimizer steps of an epoch. The last images, which fill no global batch, are left out.

    Raises:
        ConfigError: not even one.
    """
    steps_per_epoch = num_images // (config.data.batch_size * world_size) // config.runtime.accumulation
    if steps_per_epoch == 0:
        raise ConfigError(
            f"the global batch of {config.global_batch(world_size)} images is larger than the data set of "
            f"{num_images}; lower runtime.accumulation"
        )
    return steps_per_epoch


def build_model_for(config: Config, device_type: str) -> DMTJEPA:
    """`build_model`, with the error of a setting for what the device or its software cannot do."""
    try:
        return build_model(config, device_type)
    except ConfigError:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error


def find_initial_weights(config: Config, folder: RunFolder) -> Path | None:
    """The file that a new run starts from: `meta.read_checkpoint` by itself or below the run folder."""
    if not config.meta.load_checkpoint or config.meta.read_checkpoint is None:
        return None
    path = Path(expand_path(config.meta.read_checkpoint, "meta.read_checkpoint"))
    return path if path.exists() else folder.path / path
