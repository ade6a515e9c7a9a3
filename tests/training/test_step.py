"""A training step on one process: what the observer sees of it."""

import pytest
import torch
import torch.distributed as dist

from dmtjepa.config import OptimizationSettings
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.distributed import process_group
from dmtjepa.training.instruments import Observer
from dmtjepa.training.parallelize import build_mesh, parallelize
from dmtjepa.training.step import TrainStep
from tests.helpers.models import SCHEDULES, Case, make_images, make_masks, make_model, packed_masks
from tests.helpers.ranks import run_ranks


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


def count_sums_of_copies(folder):
    """Write down loss, norm and number of all-reduces of two steps of one micro-batch, and of two steps of three."""
    case, counts, results = Case(2, (6, 6), 4, 3, "clip"), [], []
    original = dist.all_reduce

    def count(*arguments, **keywords):
        counts[-1] += 1
        return original(*arguments, **keywords)

    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=3600) as world:
        dist.all_reduce = count
        masks, images = make_masks(case), make_images(case, torch.float32) + world.rank
        for num_micro_batches in (1, 3):
            model, mesh = make_model(case, torch.float32), build_mesh("cpu", 2, 1)
            parallelize(model, mesh, ComputePlan())
            step = TrainStep(model, OptimizationSettings(clip_grad=1e-3), SCHEDULES, mesh, torch.device("cpu"))
            for number in range(2):
                counts.append(0)
                loss, norm = step.advance([(images, masks)] * num_micro_batches, number)
                results.append(torch.stack([loss, norm]))
        torch.save((counts, results), folder / f"{world.rank}.pt")


@pytest.mark.slow
def test_copies_exchange_the_gradient_of_a_step_and_not_those_of_its_micro_batches(tmp_path):
    assert run_ranks(count_sums_of_copies, 2, tmp_path, tmp_path) == [(0, ""), (0, "")]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for counts, results in found:
        assert len(set(counts)) == 1, counts
        assert counts[0] > 1
        torch.testing.assert_close(results[2:], results[:2], rtol=1e-5, atol=1e-6)  # three times the same images
    assert not torch.equal(found[0][1][0][0], found[1][1][0][0])  # each rank has its own
    assert torch.equal(found[0][1][1][1], found[1][1][1][1])
