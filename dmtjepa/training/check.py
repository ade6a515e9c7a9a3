"""What must be true before a run makes its first step. Nothing here writes: a start that is refused leaves no trace."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dmtjepa.checkpoint_format import check_fits, list_checkpoints, newest_whole, read_meta, step_of
from dmtjepa.config import Config, ConfigError, expand_path
from dmtjepa.data import DataError, StoredSource, build_loader, check_batch_fits, check_loader, open_source
from dmtjepa.data.check import check_sample
from dmtjepa.data.fingerprint import Fingerprint
from dmtjepa.devices import find_device, parse_device
from dmtjepa.evaluation.evaluator import START_MEASURED, START_NOT_MEASURED, open_asked_splits
from dmtjepa.interop import load_model
from dmtjepa.interop.sources import find_initial_weights
from dmtjepa.masks import check_masks
from dmtjepa.models import ARCHITECTURES
from dmtjepa.models.attention import check_attention
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.run_folder import RunFolder, RunFolderError
from dmtjepa.training.banner import count_trained, describe_start
from dmtjepa.training.compiler import check_compiler
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.graphs import check_graphs
from dmtjepa.training.images import check_images, check_steps_per_epoch
from dmtjepa.training.parallelize import check_shard_size
from dmtjepa.training.trackers import check_loggers

logger = logging.getLogger(__name__)

MAX_LISTED = 5
"""Files of weights in a message."""


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
        RunFolderError: the run folder holds another run, cannot be written to, or has no room for a checkpoint.
    """
    check_settings(config, world_size)
    check_loggers(config)
    check_graphs(config, world_size, device_type)
    here = _find_type_here(device_type)
    if here == device_type:
        check_compiler(config, device_type)
    else:
        _check_attention(config)
    folder = RunFolder.from_config(config)
    folder.check(config, config.global_batch(world_size))
    check_loader(config.data)
    source = open_source(config.data)
    check_batch_fits(config.data, len(source), world_size)
    count_steps_per_epoch(config, world_size, len(source))
    open_asked_splits(config)
    with torch.device("meta"):  # shapes alone
        model = build_model_for(config, here)
    check_space(folder, model)
    weights = find_initial_weights(config, folder)
    if weights is not None and not list_checkpoints(folder.checkpoints):
        _check_exists(config, weights)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")  # nothing is loaded here
            load_model(model, weights)
    return source


def _check_exists(config: Config, weights: Path) -> None:
    """Refuse `meta.read_checkpoint` that names nothing, with what is beside it.

    Raises:
        ConfigError: neither it nor the same below the run folder exists.
    """
    if weights.exists():
        return
    given = Path(expand_path(str(config.meta.read_checkpoint), "meta.read_checkpoint"))
    for place in (given, Path(config.logging.folder, given)):
        if place.is_dir():
            raise ConfigError(
                f"meta.read_checkpoint: {place} holds no weights: no export, no checkpoint, no model.safetensors"
            )
    below = "" if given.is_absolute() else ", nor below logging.folder"
    others = sorted(path.name for path in given.parent.glob("*.pth.tar"))[:MAX_LISTED]
    beside = f"{given.parent} holds {', '.join(others)}" if others else "name a run folder, or a file of weights"
    raise ConfigError(f"meta.read_checkpoint: there is no {given}{below}; {beside}")


def check_settings(config: Config, world_size: int) -> None:
    """Check what depends on no machine: masks, and the number of processes.

    Raises:
        ConfigError, MaskError: the settings do not allow a single step anywhere.
    """
    check_masks(config.mask, config.grid_size)
    check_shard_size(world_size, config.runtime.shard_size)
    with torch.device("meta"):  # shapes alone
        build_model_for(config, "cpu")


def check_checkpoint(
    config: Config, folder: RunFolder, source: StoredSource, loader: str, world_size: int
) -> tuple[Path | None, Fingerprint]:
    """Check the checkpoint that a start resumes from. Changes nothing.

    Args:
        loader: name of the loader that reads the images.

    Returns:
        The newest whole checkpoint, or None if there is no checkpoint, and what this start trains on.

    Raises:
        CheckpointError: all checkpoints are damaged, the newest whole one does not fit the model, or the data have
            changed.
    """
    checkpoint = newest_whole(folder.checkpoints)
    if checkpoint is not None:
        with torch.device("meta"):
            model = build_model_for(config, "cpu")
        check_fits(checkpoint, {f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()})
        steps_per_epoch = count_steps_per_epoch(config, world_size, len(source))
        check_steps_per_epoch(checkpoint, read_meta(checkpoint), steps_per_epoch, len(source))
    return checkpoint, check_images(config, folder, source, loader, checkpoint)


def check_dry_run(config: Config, world_size: int, devices: Sequence[str]) -> str:
    """All that a start checks before its first step, on this machine, and whether a few images can be decoded.

    Args:
        devices: at least one, of one kind, which this machine need not have.

    Returns:
        What the start would say (`describe_start`), and what could not be checked here.

    Raises:
        CheckpointError: see `check_checkpoint`; and what `check_start` and `check_sample` raise.
    """
    device = parse_device(devices[0])
    here = _find_type_here(device.type)  # a login node may have no GPU
    source = check_start(config, world_size, device.type)
    check_sample(source, config.data)
    folder = RunFolder.from_config(config)
    folder.check_unlocked()
    loader = build_loader(config.data, seed=config.runtime.seed, world_size=world_size, device=here, source=source)
    loader.close()
    checkpoint, _ = check_checkpoint(config, folder, source, loader.name, world_size)
    _check_evaluated(config, is_new=checkpoint is None)
    with torch.device("meta"):
        model = build_model_for(config, here)
    facts = describe_start(
        config,
        source,
        world_size=world_size,
        device=device,
        loader=loader.name,
        steps_per_epoch=count_steps_per_epoch(config, world_size, len(source)),
        num_parameters=count_trained(model),
        step=0 if checkpoint is None else step_of(checkpoint),
    )
    missing = [name for name in devices if find_device(name) is None]
    if not missing:
        return facts
    unchecked = "" if here == device.type else f". Not checked: {', '.join(_list_unchecked(config, loader.name))}"
    return f"{facts}\n\nthis machine has no {', '.join(missing)}{unchecked}"


def _check_evaluated(config: Config, *, is_new: bool) -> None:
    """Check the images of evaluations during training as a start does, and whether a few of them can be decoded.

    A fault of images that only `evaluation.measure_start` asks for ends no start: it is logged.

    Raises:
        DataError, ConfigError: `evaluation.every_epochs` asks, and nothing can be measured.
    """

    def log_fault(reason: str) -> None:
        logger.info(START_NOT_MEASURED, reason)

    splits = open_asked_splits(config, log_fault)
    if splits is None:
        return
    parts = [splits.validation] if config.evaluation.data is None else [splits.train, splits.validation]
    try:
        for part in parts:  # where they are those of the run, training images were tried before
            check_sample(part, config.data, evaluated=True)
    except DataError as error:
        if config.evaluation.every_epochs:
            raise
        log_fault(str(error))
        return
    if is_new and not config.evaluation.every_epochs:
        logger.info(START_MEASURED, len(splits.train), len(splits.validation))


def _find_type_here(device_type: str) -> str:
    """`device_type`, or `cpu` on a machine without a GPU."""
    return device_type if torch.cuda.is_available() else "cpu"


def _check_attention(config: Config) -> None:
    """What building a model for a GPU checks of `runtime.attention`.

    Raises:
        ConfigError: the backend has no kernel for a head size, or is not installed.
    """
    architecture = ARCHITECTURES[config.meta.model_name]
    for width in (architecture["embed_dim"], config.meta.pred_emb_dim):
        try:
            check_attention(config.runtime.attention, width // architecture["num_heads"])
        except (ValueError, ModuleNotFoundError) as error:
            raise ConfigError(str(error)) from error


def _list_unchecked(config: Config, loader: str) -> Iterator[str]:
    """What a start on a GPU needs, and a machine without one cannot tell."""
    if ComputePlan.from_config(config, "cuda").compiled or config.runtime.kernels == "triton":
        yield "the C compiler and its cache"
    if config.runtime.teacher_precision == "fp8":
        yield "whether the GPU multiplies in float8"
    if loader == "dali":
        yield "DALI on the GPU"
    yield "whether its memory suffices for the estimate above"


def check_space(folder: RunFolder, model: DMTJEPA) -> None:
    """Refuse a disk without room for one checkpoint.

    Raises:
        RunFolderError: with both sizes.
    """
    student = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    values = sum(tensor.numel() for tensor in model.state_dict().values()) + 2 * student  # AdamW keeps two averages
    place = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    disk = shutil.disk_usage(place)
    if disk.total > 0 and disk.free < 4 * values:  # some network file systems report no sizes
        unit, name = (2**30, "GiB") if values >= 2**28 else (2**20, "MiB")
        raise RunFolderError(
            f"{folder.path} (logging.folder) has room for {disk.free / unit:.1f} {name}, and a checkpoint takes "
            f"{4 * values / unit:.1f} {name}; free some, or choose another logging.folder"
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
