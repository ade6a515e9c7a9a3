"""`shapes`: a set of drawn images with classes and masks (shape_drawing.py), so that training needs no download.

The set is a pure function of its parameters. It is written once, as JPEG files in a folder per class and PNG masks, to
a cache folder whose name contains a hash of the parameters:

    <cache>/shapes-<hash>/{train,val}/<class>/00000.jpg          RGB
    <cache>/shapes-<hash>/masks/{train,val}/<class>/00000.png    0: ground, 1 + class index: the object
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from dmtjepa.data.cache import cache_folder
from dmtjepa.data.sources.shape_drawing import CLASS_NAMES, DRAWING_VERSION, ShapesParameters, draw_image, to_rgb
from dmtjepa.files import sync_folder, write_json
from dmtjepa.processes import die_with_parent

logger = logging.getLogger(__name__)

DEFAULT = ShapesParameters()
_SPLITS = "train", "val"
# The colours in which viewers show the classes of a mask.
_PALETTE = [0, 0, 0, *(round(255 * value) for i in range(len(CLASS_NAMES)) for value in to_rgb(i / 10, 0.7, 0.95))]


def find_shapes(parameters: ShapesParameters = DEFAULT, cache: Path | None = None) -> Path:
    """The folder of the drawn set, which is drawn now if it is not in the cache.

    The set is written to a temporary folder that is renamed when it is complete. So a killed run leaves no incomplete
    set, and each of several processes that start together gets a complete one.
    """
    key = json.dumps({"version": DRAWING_VERSION, **asdict(parameters)}, sort_keys=True)
    folder = (cache or cache_folder()) / f"shapes-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("drawing %d images into %s", parameters.num_train + parameters.num_val, folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_set(parameters, temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_set(parameters: ShapesParameters, folder: Path) -> None:
    write_json(folder / "parameters.json", asdict(parameters))
    for split in _SPLITS:
        for name in CLASS_NAMES:
            (folder / split / name).mkdir(parents=True)
            (folder / "masks" / split / name).mkdir(parents=True)
    total = parameters.num_train + parameters.num_val
    processes = min(len(os.sched_getaffinity(0)), 16, total)
    # Spawned, not forked, because the caller may have started CUDA or threads.
    with multiprocessing.get_context("spawn").Pool(processes, die_with_parent, (os.getpid(),)) as pool:
        chunks = [(parameters, folder, start, min(start + 250, total)) for start in range(0, total, 250)]
        pool.starmap(_write_images, chunks)


def _write_images(parameters: ShapesParameters, folder: Path, start: int, stop: int) -> None:
    for number in range(start, stop):
        split = "train" if number < parameters.num_train else "val"
        label = number % len(CLASS_NAMES)
        pixels, mask = draw_image(parameters, label, number)
        place = Path(split, CLASS_NAMES[label], f"{number:05d}")
        Image.fromarray(pixels).save((folder / place).with_suffix(".jpg"), quality=92)
        colored_mask = Image.fromarray(mask, mode="P")
        colored_mask.putpalette(_PALETTE)
        colored_mask.save((folder / "masks" / place).with_suffix(".png"))
