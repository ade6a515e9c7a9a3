"""What is measured: a run, or weights by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dmtjepa.config import Config
from dmtjepa.evaluation.bare_weights import settings_of_weights
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.option_names import KEYWORDS, OptionNames
from dmtjepa.interop.hub import find_hub_name
from dmtjepa.interop.sources import find_source, find_weights_of_run
from dmtjepa.run_folder import RunFolder, open_run


class Subject(NamedTuple):
    """What is measured. checkpoint: a file of weights or a folder checkpoints/step-N. out: the folder of the report."""

    run: RunFolder
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

    Weights by themselves, a file, a folder of Hugging Face or timm, or the name of a repository of Hugging Face, have
    settings made from their shapes.

    Args:
        source: a run folder, or weights.
        has_images: whether images are named, without which weights by themselves cannot be measured.
        checkpoint: the file to measure. None takes the latest of the run.
        out: the folder of the report. None takes that of the run, or one beside the weights; for weights by name, in
            the current folder.
        options: what messages call the options.

    Raises:
        EvaluationError: there are no images to measure weights on.
        RunFolderError, ConfigError, WeightsError, CheckpointError: see `open_run`, `settings_of_weights` and
            `find_weights_of_run`.
    """
    name = None if source.exists() else find_hub_name(source)
    if name is not None or source.is_file() or (source / "model.safetensors").is_file():
        if not has_images:
            raise EvaluationError(
                f"{source} has no run folder beside it, and so no images: give {options.data} a folder"
            )
        path = find_source(source)
        stem = source if name is None else Path(name.replace("/", "_"))
        beside = stem.with_name(f"{stem.name.removesuffix('.pth.tar')}-report")
        run = RunFolder(stem.parent, stem.name)
        return Subject(run, settings_of_weights(path), checkpoint or path, out or beside)
    run, config = open_run(source)
    return Subject(run, config, checkpoint or find_weights_of_run(run), out or run.report)
