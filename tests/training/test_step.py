"""A training step on one process: what the observer sees of it."""

import pytest
import torch

from dmtjepa.config import OptimizationSettings
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.instruments import Observer
from dmtjepa.training.parallelize import build_mesh, parallelize
from dmtjepa.training.step import TrainStep
from tests.helpers.models import SCHEDULES, Case, make_images, make_masks, make_model, packed_masks


class Recorder(Observer):
    def see_batch(self, predictions, targets, masks):
        self.seen = predictions, targets


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("draw_masks", [make_masks, packed_masks])
def test_the_observer_sees_the_same_targets_besides_the_context_and_the_loss_has_both_parts(head, draw_masks):
    case, found = Case(3, (6, 6), 4, 3, "clip", head=head), []
    masks = draw_masks(case)
    for weight in (0.0, 0.5):
        model = make_model(case._replace(context_loss=weight), torch.float32)
        images = make_images(case, torch.float32)
        mesh, recorder = build_mesh("cpu", 1), Recorder()
        parallelize(model, mesh, ComputePlan())
        step = TrainStep(model, OptimizationSettings(), SCHEDULES, mesh, torch.device("cpu"), observer=recorder)
        loss, norm = step([(images, masks)], 0)
        assert norm.isfinite()
        found.append((loss, *recorder.seen))
    (plain, alone, targets), (both, predictions, all_targets) = found
    assert alone.context is None
    assert len(targets) == len(masks.target_unique)
    assert len(all_targets) == len(targets) + masks.context_index.numel()
    torch.testing.assert_close(all_targets[: len(targets)], targets)
    torch.testing.assert_close(predictions.targets, alone.targets)
    assert both > plain
