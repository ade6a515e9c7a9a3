"""What is measured: a run, or weights by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dmtjepa.config import Config
from dmtjepa.evaluation.bare_weights import settings_of_weights
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.option_names import KEYWORDS, OptionNames
from dmtjepa.interop.hub import find_hub_name
from dmtjepa.interop.sources import check_exists, find_run_of, find_source, find_weights_of_run, is_weights
from dmtjepa.run_folder import RunFolder, open_run


class Subject(NamedTuple):
    """What is measured.

    name: of the run folder, of the file or folder of weights, or of a repository of Hugging Face.
    run: its folder; None for weights by themselves, which have no curves and no verdict on their training.
    checkpoint: a file of weights or a folder checkpoints/step-N.
    out: the folder of the report.
    """

    name: str
    run: RunFolder | None
    config: Config
    checkpoint: Path
    out: Path


def find_subject(
    source: Path,
    *,
    has_images: bool,
    checkpoint: Path | None = None,
    out: Path | None = None,
    options: OptionNames = KEYWORDS,
) -> Subject:
    """Find the run and its settings, the file to measure, and the folder of the report.

    Weights by themselves, a file, a checkpoint folder, a folder of Hugging Face or timm, or the name of a repository of
    Hugging Face, have settings made from their shapes. They are by themselves in the folder of a run, too.

    Args:
        source: a run folder, or weights.
        has_images: whether images are named, without which weights by themselves cannot be measured.
        checkpoint: the file to measure, by itself or below the run folder. None takes the latest of the run. Other
            weights than the run's are by themselves, and are measured with its settings.
        out: the folder of the report. None takes that of the run, or one beside the weights; for weights by name, in
            the current folder.
        options: what messages call the options.

    Raises:
        EvaluationError: there are no images to measure weights on, or a checkpoint is named besides weights.
        RunFolderError, ConfigError, WeightsError, CheckpointError: see `open_run`, `settings_of_weights`, `find_source`
            and `find_weights_of_run`.
    """
    hub_name = None if source.exists() else find_hub_name(source)
    if hub_name is None:
        check_exists(source)
    if hub_name is None and not is_weights(source):
        return _find_in_run(source, checkpoint, out)
    if checkpoint is not None:
        raise EvaluationError(
            f"{options.checkpoint} names weights of a run, and {source} are weights by themselves: name one of them"
        )
    if hub_name is not None and not has_images:
        raise EvaluationError(
            f"there is no file or folder {source}; to measure weights of this name on Hugging Face, give "
            f"{options.data} a folder of images"
        )
    path = find_source(source)
    config = settings_of_weights(path)
    if not has_images:
        run_folder = find_run_of(source)
        in_run = f", or name the run folder {run_folder}, and these weights as {options.checkpoint}"
        raise EvaluationError(
            f"{source} are weights by themselves, without images: give {options.data} a folder"
            + in_run * (run_folder is not None)
        )
    if hub_name is not None:
        name, place = hub_name, Path(hub_name.replace("/", "_"))
    else:
        name, place = _name_weights(source)
    return Subject(name, None, config, path, out or _find_beside(place))


def _find_in_run(source: Path, checkpoint: Path | None, out: Path | None) -> Subject:
    """Weights of a run, or others with its settings; see `find_subject`."""
    run, config = open_run(source)
    if checkpoint is None:
        checkpoint = find_weights_of_run(run)
    elif not checkpoint.exists() and (run.path / checkpoint).exists():
        checkpoint = run.path / checkpoint
    if run.holds(checkpoint):
        return Subject(run.path.resolve().name, run, config, checkpoint, out or run.report)
    name, place = _name_weights(checkpoint)
    return Subject(name, None, config, checkpoint, out or _find_beside(place))


def _name_weights(source: Path) -> tuple[str, Path]:
    """The name of a folder, or that of a file without its extension; and the path, which ends with a name."""
    place = source if source.name not in ("", "..") else source.resolve()  # `.` has no name
    if source.is_dir():
        return place.name, place
    return place.name.removesuffix(".tar").rpartition(".")[0] or place.name, place


def _find_beside(place: Path) -> Path:
    """The folder of the report beside weights."""
    return place.with_name(f"{place.name.removesuffix('.pth.tar')}-report")
