"""What is measured during training: k-NN, linear probes and segmentation, of the last blocks of student and teacher."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dmtjepa.config import Config, ConfigError, expand_path
from dmtjepa.data import DataError
from dmtjepa.data.sources.base import ImageSource
from dmtjepa.data.sources.huggingface import is_reference
from dmtjepa.evaluation.context import EvaluationContext, build_split_loader
from dmtjepa.evaluation.errors import EvaluationError, NotMeasuredError
from dmtjepa.evaluation.features import autocast, average_fields, average_patches, last_layers
from dmtjepa.evaluation.figure_data import add_nearest, collect_figure_data
from dmtjepa.evaluation.knn import DINO_NEIGHBORS, knn_accuracy, standardize
from dmtjepa.evaluation.linear import MIN_ROWS, fit_linear
from dmtjepa.evaluation.page.sheets import make_sheets
from dmtjepa.evaluation.ranks import Failure, Ranks
from dmtjepa.evaluation.retrieval import FeaturedImages
from dmtjepa.evaluation.segmentation import find_masked, read_masks, segment
from dmtjepa.evaluation.splits import Splits, Subset, find_splits
from dmtjepa.models import VisionTransformer

logger = logging.getLogger(__name__)

NUM_BLOCKS = 4
"""Blocks of an encoder that are measured, counted from the last."""
LAYOUT_DECAYS, LAYOUT_ITERATIONS = (1e-1, 1e-2, 1e-3), 30
"""Of linear probes of features with layout, which have up to 16 times as many dimensions: training waits for them."""
MAX_GALLERY = 20_000
"""Training images among which pictures show the nearest ones."""

START_MEASURED = (
    "before the first step and after the last, student and teacher are measured on %d and %d images "
    "(evaluation.measure_start=false: not)"
)
START_NOT_MEASURED = "the weights that the run starts from are not measured. %s"
"""What a start logs, and a dry run."""

Encoders: TypeAlias = Mapping[str, VisionTransformer]
"""`teacher` and `student`, frozen."""
Task: TypeAlias = Callable[[], dict[str, float]]
"""Measures one kind of features; returns numbers by name."""
MEASURES = {
    "pooled": "k-NN and linear probe",
    "layout": "k-NN and linear probe with layout",
    "patches": "segmentation",
}
"""What is measured on each kind of features, for messages."""


class FeatureKey(NamedTuple):
    """What features are of: a block of an encoder, from 1 to depth; and their kind, `pooled`, `layout` or `patches`."""

    kind: str
    block: int
    depth: int
    encoder: str

    @property
    def prefix(self) -> str:
        """What the names of results begin with: nothing for the last block of the teacher."""
        encoder = "" if self.encoder == "teacher" else f"{self.encoder}/"
        return encoder if self.block == self.depth else f"{encoder}block{self.block}/"


@dataclass
class _Part:
    """What this rank has read of a split: features of its images, in their order, and their labels and masks."""

    features: dict[FeatureKey, list[Tensor]] = field(default_factory=dict)
    labels: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    def add(self, key: FeatureKey, features: Tensor) -> None:
        self.features.setdefault(key, []).append(features.cpu())


def open_asked_splits(config: Config, on_fault: Callable[[str], None] = lambda reason: None) -> Splits | None:
    """The images of `open_splits`, or None if the settings ask for no evaluation during training.

    Args:
        on_fault: called with the reason if only `evaluation.measure_start` asks, and nothing can be measured: the run
            goes on without.

    Raises:
        DataError, ConfigError: as `open_splits`, if `evaluation.every_epochs` asks.
    """
    if config.evaluation.every_epochs:
        return open_splits(config)
    if not config.measures_start:
        return None
    try:
        return open_splits(config)
    except (DataError, ConfigError) as error:
        on_fault(str(error))
        return None


def open_splits(config: Config) -> Splits:
    """The images that the settings name for evaluations during training.

    Raises:
        DataError: they are missing, or have neither labels nor masks.
        ConfigError: `evaluation.data` names an environment variable that is not set.
    """
    data = None
    if config.evaluation.data is not None:
        data = Path(expand_path(config.evaluation.data, "evaluation.data"))
        if not is_reference(data) and not data.exists():
            raise DataError(f"evaluation.data: {data} does not exist; name the images to evaluate on")
    splits = find_splits(
        config.data,
        data=data,
        max_images=config.evaluation.max_images,
    )
    if splits.unlabelled is not None and not all(len(find_masked(part)) for part in (splits.train, splits.validation)):
        every_epochs = config.evaluation.every_epochs
        asks, off = ("evaluation.every_epochs", 0) if every_epochs else ("evaluation.measure_start", "false")
        raise DataError(
            f"{asks}: nothing can be measured during training on {splits.description}: {splits.unlabelled}; and there "
            f"are no masks beside them. Set evaluation.data to images with labels or masks, or {asks}: {off}"
        )
    return splits


class Evaluator:
    """Measures encoders on the images of two splits. Each rank reads some of the images and fits some of the probes.

    Args:
        config: settings of the run.
        splits: labelled, or with masks.
        ranks: that share the work. Their number does not change the results.
        device: where this rank computes.
        num_workers: processes of this rank that load images.
        on_progress: called for each batch and each kind of features.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        ranks: Ranks,
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._splits, self._ranks = config, splits, ranks
        self._device, self._num_workers, self._on_progress = device, num_workers, on_progress
        self._corrupt: set[str] = set()  # images that the log has named
        self._gallery: FeaturedImages | None = None
        self._masked = [find_masked(source) for source in (splits.train, splits.validation)]

    def describe_images(self) -> list[tuple[str, int, str]]:
        """What it measures on: for each part its name, its number of images, and a digest of their names and labels."""
        sources = self._splits.train, self._splits.validation, *self._masked
        names = "training images", "validation images", "training images with masks", "validation images with masks"
        return [(name, len(source), _digest(source)) for name, source in zip(names, sources, strict=True)]

    @functools.cached_property
    def digest(self) -> str:
        """A digest of what it measures on, wherever that lies."""
        return hashlib.sha256(repr(self.describe_images()).encode()).hexdigest()[:16]

    def measure(self, encoders: Encoders) -> dict[str, float]:
        """Measure the last blocks of each encoder. All ranks call this alike and get, or raise, the same.

        What cannot be measured for a reason in `ranks.SURVIVED` is left out, and rank 0 warns with the reason.

        Returns:
            Numbers by name. `knn_20` and `linear` are accuracies of pooled features, from 0 to 1, computed as in the
            report; `knn_20_layout` and `linear_layout` are those of features that keep the layout of the image. `miou`
            is the mean IoU of a linear probe of patches, and `miou_error` its standard error. Names of what is not the
            teacher's last block have a prefix: `student/linear`, `block11/linear`. `train_images` and `images` are the
            numbers of images.

        Raises:
            EvaluationError: no image of a split can be read, or reading labelled images failed on a rank.
            EvaluationStopped: a rank was asked to stop.
        """
        tasks: dict[FeatureKey, Task] = {}
        numbers: dict[str, float] = {}
        if self._splits.unlabelled is None:
            numbers = self._add_classification(encoders, tasks)
        if all(map(len, self._masked)):
            self._add_segmentation(encoders, tasks)
        failed: dict[tuple[str, str], list[str]] = {}
        for key, result in zip(tasks, self._ranks.run(list(tasks.values())), strict=True):
            if isinstance(result, Failure):
                failed.setdefault((MEASURES[key.kind], result.reason), []).append(f"{key.encoder}, block {key.block}")
            else:
                numbers |= result
        for (measure, reason), features in failed.items():
            self._warn_not_measured(f"{measure} ({'; '.join(features)})", reason)
        return numbers

    def _warn_not_measured(self, what: str, reason: str) -> None:
        if self._ranks.rank == 0:
            logger.warning("%s: not measured: %s", what, reason)

    def draw(self, teacher: VisionTransformer, *, masks: bool) -> dict[str, bytes]:
        """Draw what the teacher sees in some validation images. Rank 0 calls this, after `measure`.

        Args:
            masks: draw the masks, too, which are the same each time.

        Returns:
            JPEG files by name: `masks`, `neighbors`, `pca`, `nearest`. Nearest images are sought in the training
            images, and are left out if these have no labels.
        """
        context = EvaluationContext(
            self._config,
            {"trained": teacher},
            self._splits,
            self._device,
            self._num_workers,
            progress=False,
            corrupt=self._corrupt,
        )
        data = collect_figure_data(context, loss=None, accuracy={}, chance=None)
        gallery, self._gallery = self._gallery, None
        if gallery is not None:
            with contextlib.suppress(NotMeasuredError):
                data = add_nearest(data, context, gallery)
        return make_sheets(data if masks else replace(data, target_index=None))

    def _keep_gallery(self, train: _Part, teacher: VisionTransformer) -> None:
        """Keep features of training images on rank 0, for `draw`."""
        depth, source = len(teacher.blocks), self._splits.train
        key = FeatureKey("pooled", depth, depth, "teacher")
        features = self._ranks.gather_on(0, train.features.get(key, []))
        if len(features) == len(source):  # an image that cannot be read would shift the others
            chosen = np.linspace(0, len(source) - 1, min(len(source), MAX_GALLERY), dtype=np.int64)
            self._gallery = FeaturedImages(Subset(source, chosen), features[chosen])

    def _add_classification(self, encoders: Encoders, tasks: dict[FeatureKey, Task]) -> dict[str, float]:
        """Add k-NN and linear probes to `tasks`. Returns the numbers of images."""
        parts = self._read_all(encoders, (self._splits.train, self._splits.validation), dense=False)
        labels = [self._ranks.gather(part.labels) for part in parts]
        if not all(map(len, labels)):
            raise EvaluationError("no images of a split could be read; check the images that are evaluated")
        if "teacher" in encoders:
            self._keep_gallery(parts[0], encoders["teacher"])
        for key in _keys(encoders, ("layout", "pooled")):  # what takes longest first
            owner = self._ranks.owner(len(tasks))
            train, validation = (self._ranks.gather_on(owner, part.features.get(key, [])) for part in parts)
            tasks[key] = functools.partial(self._classify, key, train, labels[0], validation, labels[1])
        return {"train_images": len(labels[0]), "images": len(labels[1])}

    def _add_segmentation(self, encoders: Encoders, tasks: dict[FeatureKey, Task]) -> None:
        """Add linear probes of patches to `tasks`, unless images or masks cannot be used, which is logged."""
        try:
            parts = self._read_all(encoders, self._masked, dense=True)
        except EvaluationError as error:  # raised alike on all ranks
            self._warn_not_measured(MEASURES["patches"], str(error))
            return
        for key in _keys(encoders, ("patches",)):
            owner = self._ranks.owner(len(tasks))
            columns = [rows for part in parts for rows in (part.features.get(key, []), part.masks)]
            rows_on_owner = [self._ranks.gather_on(owner, rows) for rows in columns]
            tasks[key] = functools.partial(self._segment, key, *rows_on_owner)

    def _read_all(self, encoders: Encoders, sources: Sequence[ImageSource], *, dense: bool) -> list[_Part]:
        """What `_read` returns of each source. Raises as `Ranks.together`."""
        return [
            self._ranks.together(functools.partial(self._read, encoders, source, dense=dense)) for source in sources
        ]

    @torch.no_grad()
    def _read(self, encoders: Encoders, source: ImageSource, *, dense: bool) -> _Part:
        """Features of the images of this rank: pooled and with layout, or, if `dense`, of patches, and the masks."""
        part, config = _Part(), self._config
        mine = self._ranks.take_part(source)
        loader = build_split_loader(mine, config, self._corrupt, num_workers=self._num_workers)
        for images, labels, names in loader if len(mine) else ():
            if self._ranks.is_stopped():
                break
            self._on_progress()
            for name, encoder in encoders.items():
                for block, patches in self._encode(encoder, images):
                    at = functools.partial(FeatureKey, block=block, depth=len(encoder.blocks), encoder=name)
                    if dense:
                        part.add(at("patches"), patches.float())
                    else:
                        part.add(at("pooled"), average_patches(patches))
                        part.add(at("layout"), average_fields(patches, config.grid_size))
            if labels is not None:
                part.labels.append(labels)
            if dense:
                part.masks.append(read_masks(names, config.data.image_size))
        return part

    def _encode(self, encoder: VisionTransformer, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number from 1, output [B,N,D]) of each of the last blocks."""
        depth = len(encoder.blocks)
        with autocast(self._device):
            layers = last_layers(encoder, images.to(self._device, non_blocking=True), min(NUM_BLOCKS, depth))
        return zip(range(depth - len(layers) + 1, depth + 1), layers, strict=True)

    def _classify(
        self, key: FeatureKey, train: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor
    ) -> dict[str, float]:
        """k-NN for all features; linear probes for pooled ones and, since they take long, the last block's layout."""
        self._on_progress()
        suffix, results = "_layout" if key.kind == "layout" else "", {}
        neighbors = [k for k in DINO_NEIGHBORS if k <= len(train)]
        if neighbors:
            gallery, queries = standardize(train, features)
            accuracy = knn_accuracy(
                gallery, train_labels, queries, labels, num_neighbors=neighbors, device=self._device
            )
            results = {f"knn_{k}{suffix}": value for k, value in accuracy.items()}
        if len(train) >= MIN_ROWS and (key.kind == "pooled" or key.block == key.depth):
            if key.kind == "pooled":
                probe = fit_linear(train, train_labels, device=self._device)
            else:
                probe = fit_linear(
                    train, train_labels, decays=LAYOUT_DECAYS, max_iterations=LAYOUT_ITERATIONS, device=self._device
                )
            results[f"linear{suffix}"] = probe.accuracy(features, labels)
        return {key.prefix + name: value for name, value in results.items()}

    def _segment(
        self, key: FeatureKey, train_patches: Tensor, train_masks: Tensor, patches: Tensor, masks: Tensor
    ) -> dict[str, float]:
        self._on_progress()
        found = segment(train_patches, train_masks, patches, masks, self._config.grid_size, device=self._device)
        scores = found.scores
        return {f"{key.prefix}miou": scores.mean_iou, f"{key.prefix}miou_error": scores.mean_iou_error}


def _digest(source: ImageSource) -> str:
    """SHA-256 of the names and labels of the images, in their order."""
    digest = hashlib.sha256(source.keys().digest().encode())
    if source.labels is not None:
        digest.update(np.ascontiguousarray(source.labels).tobytes())
    return digest.hexdigest()


def _keys(encoders: Encoders, kinds: tuple[str, ...]) -> list[FeatureKey]:
    """The features of the given kinds: those of the last blocks first, so that ranks share long tasks evenly."""
    return [
        FeatureKey(kind, block, len(encoder.blocks), name)
        for kind in kinds
        for from_last in range(NUM_BLOCKS)
        for name, encoder in encoders.items()
        if (block := len(encoder.blocks) - from_last) > 0
    ]
