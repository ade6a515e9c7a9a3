"""All ranks have the same images, settings and initial weights, or the run says which one differs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dmtjepa.checkpoint_format import describe_file
from dmtjepa.config import Config, Resume, different_settings, resume_rules
from dmtjepa.data import ImageSource
from dmtjepa.data.fingerprint import ImageList, describe_change
from dmtjepa.evaluation.evaluator import Evaluator
from dmtjepa.training.distributed import DistributedError, World

T = TypeVar("T")

MAX_LISTED = 8
"""Ranks in a message."""
_WHEN_SHARED = "If files on shared storage were changed lately, start again when all nodes see the change"


def check_ranks_agree(config: Config, source: ImageSource, loader: str, world: World) -> None:
    """Refuse ranks that have other images than rank 0, or read them with another loader or other settings.

    That happens where nodes see different states of a shared folder, or have different software. All ranks call this.
    Each sends digests of its names and its settings. The names themselves are sent only if digests differ.

    Args:
        loader: name of the loader that reads the images.

    Raises:
        DistributedError: on all ranks, with the ranks that differ and in what.
    """
    names = source.keys()
    settings = hashlib.sha256(config.to_yaml().encode()).hexdigest()
    found = _gather((len(names), names.digest(), loader, settings), world)
    if all(other == found[0] for other in found):
        return
    own = config, ImageList(names, {}), loader
    first: list[Any] = [own]
    dist.broadcast_object_list(first, src=0, device=torch.device("cpu"))
    config_0, images_0, loader_0 = first[0]
    differences = _describe_difference(config_0, images_0, loader_0, *own)
    _refuse(differences, "some ranks would not train on the same as rank 0", _WHEN_SHARED, world)


def check_weights_agree(path: Path, world: World) -> None:
    """Refuse ranks on which the file of the initial weights holds other bytes than on rank 0. All ranks call this.

    FSDP2 would make one network of parts of several. The whole file is compared: each rank is about to read it anyway.

    Args:
        path: of the file on this rank.

    Raises:
        DistributedError: on all ranks, with the ranks that differ.
    """
    if world.world_size == 1:
        return
    own = describe_file(path)
    first = _gather(own, world)[0]
    differences = ""
    if own["bytes"] != first["bytes"]:
        differences = f"{path} has {own['bytes']} bytes and not {first['bytes']}"
    elif own != first:
        differences = f"{path} has other contents"
    _refuse(
        differences,
        "some ranks would not start from the same weights as rank 0 (meta.read_checkpoint)",
        f"Copy the file to all nodes again, or put it on shared storage. {_WHEN_SHARED}",
        world,
    )


def first_fault(fault: str | None, world: World) -> str | None:
    """The fault of the lowest rank that has one, or None. All ranks call this."""
    return next((found for found in _gather(fault, world) if found is not None), None)


def check_evaluation_agrees(evaluator: Evaluator, world: World) -> None:
    """Refuse ranks that would be measured on other images than rank 0: each rank reads a part. All ranks call this.

    Raises:
        DistributedError: on all ranks, with the ranks that differ.
    """
    own = evaluator.describe_images()
    first = _gather(own, world)[0]
    differences = [
        f"{count} {name} and not {count_0}" if count != count_0 else f"other names or labels of {name}"
        for (name, count, digest), (_, count_0, digest_0) in zip(own, first, strict=True)
        if digest != digest_0
    ]
    _refuse(
        ", ".join(differences),
        "some ranks would not be measured on the same images as rank 0 (evaluation.data)",
        _WHEN_SHARED,
        world,
    )


def _refuse(differences: str, what: str, remedy: str, world: World) -> None:
    """Raise DistributedError on all ranks if one differs from rank 0. `differences`: how this one does, or nothing."""
    lines = [line for line in _gather(f"  {world.name}: {differences}" if differences else "", world) if line]
    if lines:
        more = [f"  and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
        raise DistributedError("\n".join([f"{what}:", *lines[:MAX_LISTED], *more, remedy]))


def _gather(value: T, world: World) -> list[T]:
    """The values of all ranks, in their order."""
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def _describe_difference(
    config_0: Config, images_0: ImageList, loader_0: str, config: Config, images: ImageList, loader: str
) -> str:
    """How a rank differs from rank 0, or nothing. Paths of the images and numbers of workers may differ."""
    texts = []
    if images.names.digest() != images_0.names.digest():
        change = describe_change(images_0, images)
        texts.append(f"{len(images.names)} images and not {len(images_0.names)}: {change}")
    if loader != loader_0:
        texts.append(f"the loader {loader} and not {loader_0} (data.loader)")
    rules = resume_rules(Config)
    for key, first, own in different_settings(config_0, config):
        if rules[key] is not Resume.FREE or not key.startswith("data."):
            texts.append(f"{key} is {own} and not {first}")
    return "; ".join(texts)
