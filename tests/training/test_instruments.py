"""Instruments in the loop: they see what they should, on any number of processes, and change nothing."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dmtjepa.config import find_settings, load_config
from dmtjepa.masks import MaskSampler
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.run_folder import RunFolder
from dmtjepa.training import instruments
from dmtjepa.training.instruments import Instruments, Observer
from dmtjepa.training.launch import launch
from dmtjepa.training.step import TrainStep

TARGETS = {
    f"targets/{name}"
    for name in (
        "explained_variance", "variance", "variance_between_images", "variance_of_position", "variance_within_images",
    )
}  # fmt: skip
LOOKS = {
    f"{kind}/{name}"
    for kind in ("features", "targets")
    for name in ("effective_rank", "effective_rank_centered", "mean_cosine")
}


def rows_of(config):
    """The rows of a run by the number of steps that were done."""
    return {row["step"] + 1: row for row in RunFolder.from_config(config).read_metrics()}


@pytest.mark.slow
def test_logged_steps_have_figures(plain, losses):
    rows = rows_of(plain)
    assert list(rows) == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]  # every 3 steps, and at the end of each epoch
    measured = {step for step, row in rows.items() if row.keys() >= TARGETS}
    assert measured == {3, 6, 9, 12, 15, 18, 21, 24}
    assert rows[8]["train/loss"] == pytest.approx(sum(losses(plain)[6:8]) / 2, rel=1e-6)
    assert rows[24]["epoch"] == 3
    assert not any("context/explained_variance" in row for row in rows.values())  # there is no context loss
    assert all(row.keys().isdisjoint(LOOKS) for row in rows.values())  # the run is shorter than LOOK_EVERY


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"patch.local_agg_head": False}, {"mask.pack": True}], ids=str)
def test_looks_have_the_other_figures_and_training_is_the_same(settings, losses, monkeypatch, changes):
    monkeypatch.setattr(instruments, "LOOK_EVERY", 5)
    config = settings(**{"optimization.epochs": 2, "runtime.accumulation": 2, "data.batch_size": 8} | changes)
    assert launch(config, ["cpu"]) == 0
    rows = rows_of(config)
    assert {step for step, row in rows.items() if row.keys() >= LOOKS} == {6, 12}
    assert {step for step, row in rows.items() if "neighbors/changed" in row} == {12}  # the first look compares nothing
    assert 0 < rows[12]["neighbors/changed"] < 1
    assert 1 <= rows[12]["features/effective_rank"] <= 16 * 6

    with monkeypatch.context() as patch:
        for name in vars(Observer):
            if not name.startswith("__"):
                patch.setattr(Instruments, name, getattr(Observer, name))
        patch.setattr(Instruments, "take", lambda self: None)
        alone = settings(
            "alone", **{"optimization.epochs": 2, "runtime.accumulation": 2, "data.batch_size": 8} | changes
        )
        assert launch(alone, ["cpu"]) == 0
    assert not any(row.keys() & TARGETS for row in rows_of(alone).values())
    assert losses(alone) == losses(config)


@pytest.mark.slow
def test_two_ranks_see_what_one_does(settings):
    changes = {"optimization.context_loss": 0.5, "optimization.epochs": 1}
    configs = settings("one", **changes), settings("two", **changes | {"data.batch_size": 8})
    assert launch(configs[0], ["cpu"]) == 0
    assert launch(configs[1], ["cpu", "cpu"]) == 0
    one, both = map(rows_of, configs)
    assert list(one) == list(both)
    names = ("targets/explained_variance", "context/explained_variance", "train/update_norm", "train/grad_norm")
    for step in (3, 6):
        for name in names:
            assert both[step][name] == pytest.approx(one[step][name], rel=1e-2), (step, name)


@pytest.mark.slow
def test_update_norm_is_that_of_the_student(settings, monkeypatch):
    config = settings(**{"optimization.epochs": 1, "optimization.warmup": 0, "runtime.log_every": 1})
    original, norms = TrainStep.__call__, []

    def compared_step(train_step, *arguments):
        before = [p.detach().clone() for p in train_step.parameters]
        result = original(train_step, *arguments)
        pairs = zip(before, train_step.parameters, strict=True)
        update = torch.stack([(new - old).full_tensor().square().sum() for old, new in pairs]).sum()
        weight = torch.stack([p.full_tensor().square().sum() for p in train_step.parameters]).sum()
        norms.append((update / weight).sqrt().item())
        return result

    monkeypatch.setattr(TrainStep, "__call__", compared_step)
    assert launch(config, ["cpu"]) == 0
    assert [row["train/update_norm"] for row in rows_of(config).values()] == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_explained_variance_of_the_context_is_that_of_all_its_predictions(settings, monkeypatch, pack):
    changes = {"optimization.context_loss": 0.5, "mask.pack": pack, "runtime.log_every": 1}
    config = settings(**{"optimization.epochs": 1, "runtime.accumulation": 2, "data.batch_size": 8} | changes)
    original, seen = DMTJEPA.loss, []

    def recorded_loss(model, predictions, targets, masks):
        rows = targets[len(masks.target_unique) :].float()
        if pack:  # the sequences of one image follow each other
            lengths = masks.context_packing.lengths().tolist()
            blocks = masks.target_index.shape[1]
            expected = torch.cat([part for image in rows.split(lengths) for part in [image] * blocks])
        else:
            images, blocks, _, width = predictions.context.shape
            expected = rows.view(images, 1, -1, width).expand(-1, blocks, -1, -1)
        seen.append((predictions.context.detach().double().flatten(0, -2), expected.double().flatten(0, -2)))
        return original(model, predictions, targets, masks)

    monkeypatch.setattr(DMTJEPA, "loss", recorded_loss)
    assert launch(config, ["cpu"]) == 0
    values = []
    for micro_batches in zip(seen[::2], seen[1::2], strict=True):
        predictions, targets = map(torch.cat, zip(*micro_batches, strict=True))
        error, spread = (predictions - targets).square().sum(), (targets - targets.mean(0)).square().sum()
        values.append(1 - (error / spread).item())
    found = [row["context/explained_variance"] for row in rows_of(config).values()]
    assert found == pytest.approx(values, rel=1e-4)


@pytest.mark.slow
def test_figures_are_on_the_board_too(plain):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(Path(plain.logging.folder, "tensorboard"))).Reload()
    found = {event.step: event.value for event in board.Scalars("targets/explained_variance")}
    rows = {
        step - 1: row["targets/explained_variance"] for step, row in rows_of(plain).items() if row.keys() >= TARGETS
    }
    assert found == pytest.approx(rows, rel=1e-6)


class CountElements(TorchDispatchMode):
    """Counts the elements that operators read and write: what operators without products cost."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        leaves = tree_leaves((arguments, keywords, result))
        self.total += sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "in1k_vitb16_ep600"])
def test_instruments_take_less_than_a_hundredth_of_the_steps_between_two_looks(name, tmp_path):
    """In FLOPs and in elements read and written, at the default settings. Nothing is computed: shapes tell both."""
    config = load_config(find_settings(name), {"data.root_path": str(tmp_path), "data.dataset": "folder"})
    every = config.runtime.log_every
    assert instruments.LOOK_EVERY % every == 0
    with torch.device("meta"):
        model = build_model(config)
    masks = MaskSampler.from_config(config).sample(0).to("meta")
    images = torch.zeros(config.data.batch_size, 3, *config.data.image_size, device="meta")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gauges = Instruments(model, config, num_steps=1000)

    def cost(step):
        """FLOPs and elements of a step."""
        with CountElements() as elements, FlopCounterMode(display=False) as products:
            gauges.start_step(step, [(images, masks)])
            targets = model.compute_targets(images, masks)
            predictions = model.predict_targets(images, masks)
            model.loss(predictions, targets, masks).backward()
            gauges.see_batch(predictions, targets, masks)
            with torch.no_grad(), gauges.see_update(weights):
                pass
            gauges.take()
        return torch.tensor([products.get_total_flops(), elements.total], dtype=torch.float64)

    cost(0)
    cost(instruments.LOOK_EVERY - 1)  # the first look has nothing to compare with
    first = instruments.LOOK_EVERY
    plain, logged, pooled = (cost(step) for step in (first, first + every - 1, 2 * first - 2))
    look = cost(2 * first - 1)
    assert (look > logged).all()
    assert logged[1] > plain[1]
    num_logged, num_pooled = first // every - 1, min(instruments.NUM_SAMPLES // config.data.batch_size, every)
    extra = look - plain + num_logged * (logged - plain) + num_pooled * (pooled - plain)
    share = extra / (first * plain)
    assert (share > 0).all()
    assert (share < 0.01).all(), share
