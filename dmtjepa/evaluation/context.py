"""What every measurement of a run needs: the settings, the encoders, the images and the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dmtjepa.config import Config
from dmtjepa.data import EvaluationLoader, build_eval_loader
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.evaluation.splits import Splits
from dmtjepa.interop import check_finite, get_part, load_weights, read_checkpoint
from dmtjepa.models import VisionTransformer
from dmtjepa.objective import build_model


@dataclass(frozen=True)
class EvaluationContext:
    """encoders: name -> frozen encoder on `device`; the names are `trained` and `untrained`."""

    config: Config
    encoders: dict[str, VisionTransformer]
    splits: Splits
    device: torch.device | str = "cpu"
    num_workers: int = 0
    progress: bool = True

    def build_loader(self, source: ImageSource) -> EvaluationLoader:
        """A loader of all images of `source`, cropped as the settings say."""
        batch_size = self.config.evaluation.batch_size
        return build_eval_loader(source, self.config.data.image_size, batch_size, num_workers=self.num_workers)


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
