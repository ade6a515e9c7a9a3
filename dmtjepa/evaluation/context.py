"""What every measurement of a run needs: the settings, the encoders, the images and the device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dmtjepa.config import Config
from dmtjepa.data import EvaluationLoader, build_eval_loader
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.errors import UserError
from dmtjepa.evaluation.errors import NotMeasuredError
from dmtjepa.evaluation.option_names import KEYWORDS, OptionNames
from dmtjepa.evaluation.splits import Splits
from dmtjepa.interop import WeightsError, check_finite, get_part, load_weights, read_checkpoint
from dmtjepa.interop.sources import find_initial_weights
from dmtjepa.models import VisionTransformer
from dmtjepa.objective import build_model
from dmtjepa.run_folder import RunFolder


@dataclass(frozen=True)
class EvaluationContext:
    """What is measured, and where.

    encoders: name -> frozen encoder on `device`: `trained` (the teacher), `student` if the checkpoint has it, `start`
        if the run started from weights, and `untrained`.
    quick: leave out what takes long: low-shot and attentive probes, and the last four blocks.
    options: what messages call the options.
    corrupt: names of the images that could not be read so far. The log names each once.
    """

    config: Config
    encoders: dict[str, VisionTransformer]
    splits: Splits
    device: torch.device | str = "cpu"
    num_workers: int = 0
    progress: bool = True
    quick: bool = False
    options: OptionNames = KEYWORDS
    corrupt: set[str] = field(default_factory=set)

    def build_loader(self, source: ImageSource) -> EvaluationLoader:
        """A loader of all images of `source`, cropped as the settings say."""
        return build_split_loader(source, self.config, self.corrupt, num_workers=self.num_workers)


def build_split_loader(
    source: ImageSource, config: Config, corrupt: set[str], *, num_workers: int = 0
) -> EvaluationLoader:
    """A loader of images that are measured. All that the settings say of images is passed on here, and only here."""
    data = config.data
    return build_eval_loader(
        source,
        data.image_size,
        config.evaluation.batch_size,
        num_workers=num_workers,
        channels=data.channels,
        max_value=data.max_value,
        max_megapixels=data.max_megapixels,
        named=corrupt,
    )


def load_encoders(
    config: Config, checkpoint_path: Path, device: torch.device | str = "cpu"
) -> dict[str, VisionTransformer]:
    """The encoders of `EvaluationContext`.

    Raises:
        WeightsError: as `load_teacher`; and the student does not fit the settings or is not finite.
    """
    trained, untrained = load_teacher(config, checkpoint_path, device)
    checkpoint = read_checkpoint(checkpoint_path)
    # A file of one encoder gives it as both.
    if "encoder" not in checkpoint or checkpoint["encoder"] is checkpoint["target_encoder"]:
        return {"trained": trained, "untrained": untrained}
    student = copy.deepcopy(untrained)
    load_weights(student, get_part(checkpoint, "encoder", checkpoint_path), checkpoint_path)
    check_finite(student.state_dict(), f"the student in {checkpoint_path}")
    return {"trained": trained, "student": student, "untrained": untrained}


def load_teacher(
    config: Config, checkpoint_path: Path, device: torch.device | str = "cpu"
) -> tuple[VisionTransformer, VisionTransformer]:
    """The teacher encoder of a run, and the untrained encoder that the run started from (same settings, same seed).

    Raises:
        WeightsError: the checkpoint has no teacher, or the teacher does not fit the settings or is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        # Weights are measured in full precision.
        runtime = config.runtime.model_copy(update={"teacher_precision": "same"})
        model = build_model(config.model_copy(update={"runtime": runtime}), torch.device(device).type)
    trained, untrained = model.teacher_encoder, model.encoder
    weights = get_part(read_checkpoint(checkpoint_path), "target_encoder", checkpoint_path)
    load_weights(trained, weights, checkpoint_path)
    check_finite(trained.state_dict(), f"the teacher in {checkpoint_path}")
    return trained.to(device).eval(), untrained.to(device).eval().requires_grad_(False)


def load_start(config: Config, run: RunFolder, untrained: VisionTransformer) -> VisionTransformer | None:
    """The teacher that a run started from (`meta.read_checkpoint`), None if its weights were drawn.

    Args:
        untrained: an encoder of the run, of which a copy gets the weights.

    Raises:
        NotMeasuredError: the file is no longer there, was written again since, or holds weights of another network.
    """
    start = copy.deepcopy(untrained)
    try:
        path = find_initial_weights(config, run)
        if path is None:
            return None
        check_not_newer(path, run)
        load_weights(start, get_part(read_checkpoint(path), "target_encoder", path), path)
        check_finite(start.state_dict(), path)
    except UserError as error:
        raise NotMeasuredError(f"the weights that the run started from: {error}") from error
    return start


def check_not_newer(path: Path, run: RunFolder) -> None:
    """Refuse weights that were written after the run had started, as those of another run that was continued.

    Raises:
        WeightsError: with the remedy.
    """
    started = run.read_start_time()
    if started is not None and path.exists() and path.stat().st_mtime > started:
        raise WeightsError(
            f"{path} was written after the run had started, so it may hold other weights; start from a file that does "
            "not change, such as {tag}-ep{N}.pth.tar"
        )
