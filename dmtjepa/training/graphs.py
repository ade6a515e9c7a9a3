"""Whole training steps as CUDA graphs, for models whose steps take the host longer than the GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmtjepa.config import Config, ConfigError
from dmtjepa.errors import UserError
from dmtjepa.masks import MaskBatch
from dmtjepa.models import ARCHITECTURES
from dmtjepa.models.fp8 import needs_default_stream
from dmtjepa.training.batches import MicroBatch
from dmtjepa.training.estimate import measure_masks, step_flops
from dmtjepa.training.parallelize import CASTING_VERSIONS, use_one_stream
from dmtjepa.training.phase import Phase
from dmtjepa.training.step import TrainStep

logger = logging.getLogger(__name__)

# Steps before the first capture. They create what later steps use: optimizer state, copies of the weights, workspaces.
WARM_UP = 3
# At most so many graphs are kept. The first 1,500 steps of ViT-B/16 have 70 shapes of masks, and 28 cover 80% of them.
MOST_GRAPHS = 64

# With which `cuda_graphs: auto` decides: FLOP/s of a step, and seconds of the host per transformer block. Predictions.
DEVICE_RATE = 3.5e14
HOST_SECONDS = 2e-3


class CaptureFailed(UserError, RuntimeError):
    """A step could not be captured into a CUDA graph."""


@dataclass(frozen=True)
class _Captured:
    """A captured step. Its tensors lie where the graph reads and writes them."""

    graph: torch.cuda.CUDAGraph
    masks: MaskBatch
    results: Tensor  # float32 [2]: loss, norm
    gradient_address: Tensor


class GraphedStep:
    """A `TrainStep` on one GPU whose steps are replayed as CUDA graphs, one for each shape of masks.

    The first step of a shape runs as always, and is then captured; a capture computes nothing. Further steps of the
    shape replay it: the host copies images, masks and rates to where the graph reads them. Also run as always: the
    first steps, those that the observer measures, and those of new shapes when `most_graphs` are kept. Losses do not
    depend on which steps are replayed, because all of them pad the masks alike (`pad_masks`). All graphs
    share one pool of memory, beside the memory of steps that are not replayed.

    Args:
        train_step: with `fused`. Its model keeps copies of its weights.
        most_graphs: at most so many graphs are kept.
    """

    def __init__(self, train_step: TrainStep, most_graphs: int = MOST_GRAPHS) -> None:
        if train_step.fused_update is None:
            raise ValueError("a graph reads learning rate, decay and momentum from the device: the step must be fused")
        self.train_step, self.update = train_step, train_step.fused_update
        self.most_graphs = most_graphs
        self.optimizer = train_step.optimizer
        self.num_replays = 0
        self._stream = torch.cuda.Stream(train_step.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, ...], _Captured] = {}
        self._images: Tensor | None = None
        self._num_steps = 0
        logger.info("steps are replayed as CUDA graphs, at most %d of them (runtime.cuda_graphs)", most_graphs)

    @property
    def num_graphs(self) -> int:
        """Number of captured shapes."""
        return len(self._graphs)

    def __call__(self, micro_batches: Sequence[MicroBatch], step: int) -> tuple[Tensor, Tensor]:
        """Make one update, see `TrainStep.__call__`. There is one micro-batch."""
        ((images, masks),) = micro_batches
        observer = self.train_step.observer
        current = torch.cuda.current_stream(images.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            observer.start_step(step, micro_batches)
            padded = pad_masks(masks, math.prod(self.train_step.model.encoder.grid_size))
            shape = (*images.shape, masks.context_index.shape[1], masks.target_index.shape[2])
            captured = self._graphs.get(shape)
            self.train_step.set_rates(step)
            if captured is not None and not observer.measures:
                results = self._replay(captured, images, padded)
            else:
                results = torch.stack(self.train_step.advance([(images, padded)], step, [masks]))
                self._num_steps += 1
                if self._num_steps == WARM_UP:
                    use_one_stream(self.train_step.model, self._stream)
                elif self._may_capture(shape):
                    self._graphs[shape] = self._capture(images, padded, step)
        current.wait_stream(self._stream)
        loss, norm = results.unbind()
        return loss, norm

    def _may_capture(self, shape: tuple[int, ...]) -> bool:
        room = shape not in self._graphs and len(self._graphs) < self.most_graphs
        return room and self._num_steps > WARM_UP and not self.train_step.observer.measures

    def _replay(self, captured: _Captured, images: Tensor, masks: MaskBatch) -> Tensor:
        assert self._images is not None
        self.train_step.on_phase(Phase.TARGETS)
        self._images.copy_(images)
        torch._foreach_copy_(_tensors(captured.masks), _tensors(masks))
        captured.graph.replay()
        self.num_replays += 1
        return captured.results.clone()  # the next replay writes there

    def _capture(self, images: Tensor, masks: MaskBatch, step: int) -> _Captured:
        """Capture a step of the shape of the one that was just made."""
        if self._images is None:
            self._images = images.clone()
        static = replace(masks, **{name: getattr(masks, name).clone() for name in _TENSORS})
        graph = torch.cuda.CUDAGraph()
        table = self.update.table
        before = table.gradient_address
        # The host alone writes it, so it must not lie in the pool, where replays write over what was free once.
        table.gradient_address = torch.empty_like(before)
        try:
            # Other threads go on to decode images.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                results = torch.stack(self.train_step.advance([(self._images, static)], step, quiet=True))
        except RuntimeError as error:
            raise CaptureFailed(
                f"a step could not be captured into a CUDA graph ({str(error).splitlines()[0]}); "
                "set runtime.cuda_graphs=off"
            ) from error
        table.upload_addresses()
        captured = _Captured(graph, static, results, table.gradient_address)
        table.gradient_address = before
        return captured


# The tensors of masks that are not packed.
_TENSORS = ("context_index", "target_index", "target_unique", "target_slot", "neighborhood")


def _tensors(masks: MaskBatch) -> list[Tensor]:
    return [getattr(masks, name) for name in _TENSORS]


def pad_masks(masks: MaskBatch, num_patches: int) -> MaskBatch:
    """Pad masks so that all their sizes follow from C and T. Predictions and their targets do not change.

    Args:
        masks: of images of `num_patches` patches, not packed.

    Returns:
        Masks whose `target_unique` has the largest size U that their blocks could cover, by repetition of its first
        patch, and whose `neighborhood` is every patch.
    """
    batch, num_blocks, num_targets = masks.target_index.shape
    missing = batch * min(num_patches, num_blocks * num_targets) - len(masks.target_unique)
    target_unique = torch.cat([masks.target_unique, masks.target_unique[:1].expand(missing)])
    neighborhood = torch.arange(batch * num_patches, device=target_unique.device)
    return replace(masks, target_unique=target_unique, neighborhood=neighborhood)


def check_graphs(config: Config, world_size: int, device_type: str) -> None:
    """Check that `runtime.cuda_graphs: on` can be done.

    Raises:
        ConfigError: it cannot; the message says what to change.
    """
    if config.runtime.cuda_graphs == "on" and (reason := _obstacle(config, world_size, device_type)):
        raise ConfigError(f"runtime.cuda_graphs: on {reason}, or set it to off")


def uses_graphs(config: Config, world_size: int, device_type: str) -> bool:
    """Whether a run replays CUDA graphs. `auto`: where it can and, by estimate, the host takes longer than the GPU."""
    if config.runtime.cuda_graphs == "off" or _obstacle(config, world_size, device_type):
        return False
    if config.runtime.cuda_graphs == "on":
        return True
    mean, _ = measure_masks(config)
    device = config.data.batch_size * sum(step_flops(config, mean).values()) / DEVICE_RATE
    host = HOST_SECONDS * (ARCHITECTURES[config.meta.model_name]["depth"] + config.meta.pred_depth)
    return device < host


def _obstacle(config: Config, world_size: int, device_type: str) -> str | None:
    """What `cuda_graphs` needs and a run does not have."""
    runtime = config.runtime
    needs = {
        "needs a GPU": device_type == "cuda",
        f"needs one process, and there are {world_size}": world_size == 1,
        "needs runtime.fused_update: true": runtime.fused_update,
        "needs runtime.accumulation: 1": runtime.accumulation == 1,
        "needs mask.pack: false": not config.mask.pack,
        "needs runtime.teacher_precision: same on this GPU": runtime.teacher_precision == "same"
        or not needs_default_stream(),
        f"needs PyTorch {' or '.join(version + 'x' for version in CASTING_VERSIONS)}": torch.__version__.startswith(
            CASTING_VERSIONS
        ),
    }
    return next((text for text, met in needs.items() if not met), None)
