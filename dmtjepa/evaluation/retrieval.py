"""Which images are nearest to an image, by the features of the teacher: a look at what it takes for similar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmtjepa.data.sources.base import ImageSource, make_printable
from dmtjepa.evaluation.context import EvaluationContext
from dmtjepa.evaluation.errors import NotMeasuredError
from dmtjepa.evaluation.knn import standardize
from dmtjepa.evaluation.splits import Subset

NUM_NEAREST = 9


@dataclass(frozen=True)
class FeaturedImages:
    """The n images of a source and their pooled features, float32 [n,D], in the same order."""

    source: ImageSource
    features: Tensor


@dataclass(frozen=True)
class NearestImages:
    """The nearest images of B images.

    images: uint8 [B,K,3,H,W], the most similar first. similarity: float [B,K], cosines.
    query_classes, classes: names of the classes of the B images, and of their K nearest; None without labels.
    """

    images: Tensor
    similarity: Tensor
    query_classes: list[str] | None
    classes: list[list[str]] | None


def find_nearest(
    context: EvaluationContext,
    gallery: FeaturedImages,
    features: Tensor,
    names: Sequence[str],
    labels: Tensor | None,
) -> NearestImages:
    """Find the images of a gallery that are nearest to others, by the cosine of standardised features, as k-NN does.

    Args:
        gallery: where they are sought. An image is not its own neighbour.
        features: float [B,D], pooled. names: of the B images. labels: int64 [B], or None.

    Raises:
        NotMeasuredError: images of the gallery could not be read, so that features and images do not match, or there
            are too few.
    """
    source, count = gallery.source, len(gallery.features)
    if count != len(source):
        raise NotMeasuredError(f"nearest images: {len(source) - count} of {len(source)} images cannot be read")
    num_nearest = min(NUM_NEAREST, count - 1)
    if num_nearest < 1:
        raise NotMeasuredError("nearest images: there is no other image")
    standardized, queries = standardize(gallery.features, features.float())
    similarity = F.normalize(queries, dim=1) @ F.normalize(standardized, dim=1).T
    values, indices = similarity.topk(num_nearest + 1, dim=1)
    chosen, cosines = [], []
    for name, index, value in zip(names, indices.tolist(), values.tolist(), strict=True):
        others = [(i, v) for i, v in zip(index, value, strict=True) if source.name(i) != name][:num_nearest]
        chosen.append([i for i, _ in others])
        cosines.append([v for _, v in others])
    num_nearest = min(map(len, chosen))  # a list can name an image several times
    if num_nearest < 1:
        raise NotMeasuredError("nearest images: there is no other image")
    chosen, cosines = [row[:num_nearest] for row in chosen], [row[:num_nearest] for row in cosines]
    flat = np.array(chosen, np.int64).flatten()
    loaded = torch.cat([images for images, _, _ in context.build_loader(Subset(source, flat))])
    if len(loaded) != len(flat):
        raise NotMeasuredError("nearest images: some of them cannot be read any more")
    classes = query_classes = None
    if labels is not None and source.labels is not None:
        names_of = [make_printable(name) for name in source.class_names]
        query_classes = [names_of[label] for label in labels.tolist()]
        classes = [[names_of[int(source.labels[i])] for i in row] for row in chosen]
    return NearestImages(loaded.unflatten(0, (len(chosen), -1)), torch.tensor(cosines), query_classes, classes)
