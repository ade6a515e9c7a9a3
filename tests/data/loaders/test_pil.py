"""The loader `pil`: pixels, order, resume, corrupt images, dead and stalled workers."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, FolderSource, build_loader
from dmtjepa.data.loaders.base import wait_for_progress
from dmtjepa.data.loaders.pil import _PREFETCH, PilLoader
from dmtjepa.data.sampling import FLIP_DRAW, SampleOrder, choose_crop, draw_uniforms
from tests.helpers.images import LOADERS


def batches(settings: DataSettings, epoch: int = 0, start_step: int = 0, **options: int) -> list[torch.Tensor]:
    loader = build_loader(settings, **{"seed": 7, **options})
    result = list(loader.epoch(epoch, start_step))
    loader.close()
    return result


def test_each_loader_has_the_name_of_its_setting():
    names = set(get_args(DataSettings.model_fields["loader"].annotation)) - {"auto"}
    assert all(find_spec(f"dmtjepa.data.loaders.{name}") for name in names)
    assert PilLoader.__module__.endswith(f".{PilLoader.name}")


def test_pixels_are_torchvisions_on_the_same_box(settings: DataSettings):
    source = FolderSource(settings.path)
    order = SampleOrder(len(source), settings.batch_size, seed=7)
    for flip in (False, True):
        changed = settings.model_copy(update={"use_horizontal_flip": flip, "crop_size": (32, 48)})
        for step, images in enumerate(batches(changed)):
            assert images.dtype == torch.uint8
            assert images.shape == (4, 3, 32, 48)
            for row, (position, image) in enumerate(zip(*order.request(0, step)[1:], strict=True)):
                pil_image = Image.open(source.name(image)).convert("RGB")
                uniforms = draw_uniforms(7, 0, position)
                left, top, width, height = choose_crop(*pil_image.size, uniforms, settings.crop_scale)
                expected = F.pil_to_tensor(F.resized_crop(pil_image, top, left, height, width, [32, 48]))
                if flip and uniforms[FLIP_DRAW] < 0.5:
                    expected = F.horizontal_flip(expected)
                assert torch.equal(images[row], expected)


def test_transform_is_the_official_one(settings: DataSettings):
    """v2.RandomResizedCrop itself, given our box, gives our pixels: bilinear, antialiased."""
    source = FolderSource(settings.path)
    pil_image = Image.open(source.name(0)).convert("RGB")
    box = choose_crop(*pil_image.size, draw_uniforms(0, 0, 0), (0.3, 1.0))
    transform = v2.RandomResizedCrop(32, scale=(0.3, 1.0), antialias=True)
    params = dict(zip(("left", "top", "width", "height"), box, strict=True))
    theirs = np.asarray(transform.transform(pil_image, params))
    left, top, width, height = box
    cropped = pil_image.crop((left, top, left + width, top + height))
    ours = cropped.resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(theirs, np.asarray(ours))


def test_workers_ranks_and_runs_agree(settings: DataSettings):
    alone = batches(settings)
    assert len(alone) == 7  # 30 images: the last two of the order are dropped
    workers = settings.model_copy(update={"num_workers": 2})
    for a, b in zip(alone, batches(workers), strict=True):
        assert torch.equal(a, b)
    for world_size, start in ((2, 0), (4, 0), (2, 3)):  # also what one process began
        part = settings.model_copy(update={"batch_size": 4 // world_size})
        ranks = [batches(part, 0, start, rank=rank, world_size=world_size) for rank in range(world_size)]
        for whole, *parts in zip(alone[start:], *ranks, strict=True):
            assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(alone[0], batches(settings, seed=8)[0])
    assert not torch.equal(alone[0], batches(settings, epoch=1)[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_and_decodes_nothing_skipped(settings: DataSettings, num_workers: int, monkeypatch):
    settings = settings.model_copy(update={"num_workers": num_workers})
    whole = batches(settings, epoch=2)
    read = []
    monkeypatch.setattr(FolderSource, "read", lambda self, image, read=FolderSource.read: log(self, image, read))

    def log(self: FolderSource, image: int, original) -> bytes:
        read.append(image)
        return original(self, image)

    rest = batches(settings, epoch=2, start_step=5)
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], rest, strict=True))
    if num_workers == 0:
        assert len(read) == 8


@pytest.mark.slow
def test_epochs_follow_each_other_and_can_be_left_early(settings: DataSettings):
    settings = settings.model_copy(update={"num_workers": 2})
    expected = {epoch: batches(settings, epoch=epoch) for epoch in range(3)}
    loader = build_loader(settings, seed=7)
    for epoch in (0, 1):
        for a, b in zip(loader.epoch(epoch), expected[epoch], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(next(loader.epoch(2)), expected[2][0])
    rest = list(loader.epoch(2, 1))  # goes on where the abandoned iterator stood
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[2][1:], strict=True))
    assert torch.equal(next(loader.epoch(0, 3)), expected[0][3])  # and back
    assert list(loader.epoch(0, 7)) == []
    loader.close()


def damaged(image_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(image_folder, folder)
    (folder / "ant" / "000.jpg").write_bytes(b"")
    (folder / "cat" / "002.jpg").write_bytes((folder / "cat" / "002.jpg").read_bytes()[:500])
    (folder / "bee" / "worker" / "001.jpg").unlink()
    (folder / "bee" / "worker" / "001.jpg").symlink_to(tmp_path / "gone.jpg")
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_corrupt_images_are_replaced_counted_and_named_once(
    settings: DataSettings, image_folder: Path, tmp_path: Path, num_workers: int, caplog
):
    folder = damaged(image_folder, tmp_path)
    settings = settings.model_copy(update={"root_path": str(folder), "num_workers": num_workers, "batch_size": 3})
    good = {path: image for image, path in enumerate(sorted(image_folder.rglob("*.jpg")))}
    assert len(good) == 30
    loader = build_loader(settings, seed=1)
    with caplog.at_level(logging.WARNING):
        first = [images for epoch in range(3) for images in loader.epoch(epoch)]
    loader.close()
    assert [len(images) for images in first] == [3] * 30
    assert {Path(name).name for name, _ in loader.corrupt} == {"000.jpg", "001.jpg", "002.jpg"}
    assert sum("skipped a corrupt image" in record.getMessage() for record in caplog.records) == 3
    reasons = {Path(name).name: reason for name, reason in loader.corrupt}
    assert reasons["000.jpg"] == "empty file"
    assert "runcated" in reasons["002.jpg"]
    assert reasons["001.jpg"] == "No such file or directory"
    again = batches(settings, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(again, first[:10], strict=True))


def test_too_many_corrupt_images_stop_the_run_with_the_list(settings: DataSettings, image_folder: Path, tmp_path: Path):
    folder = damaged(image_folder, tmp_path)
    strict = settings.model_copy(update={"root_path": str(folder), "max_broken": 0.05, "batch_size": 3})
    with pytest.raises(DataError, match=r"(?s)data\.max_broken = 0\.05.*empty file"):
        batches(strict)


def test_a_folder_that_vanishes_ends_the_run(settings: DataSettings, image_folder: Path, tmp_path: Path):
    shutil.copytree(image_folder, tmp_path / "gone")
    loader = build_loader(settings.model_copy(update={"root_path": str(tmp_path / "gone"), "max_broken": 1}), seed=0)
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(DataError, match="Check that the data set is still there") as error:
        next(loader.epoch(0))
    assert len(str(error.value).splitlines()) == 12  # the message, ten images, and how many more there are


class Trap(FolderSource):
    """A source that does something terrible at one image."""

    @staticmethod
    def sprung(loader: PilLoader) -> bool:
        return int(loader._maker.progress[0, 1]) == 11

    def read(self, image: int) -> bytes:
        if image == 11:
            self.spring()
        return super().read(image)


class Stall(Trap):
    def spring(self) -> None:
        time.sleep(3600)


class Die(Trap):
    @staticmethod
    def sprung(loader: PilLoader) -> bool:
        return False  # a death is noticed without a timeout

    def spring(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trap", "cause"),
    [(Stall, "no worker has finished"), (Die, "ended by SIGKILL, as when the system runs out of memory")],
)
def test_a_dead_or_stalled_worker_ends_the_run_with_its_cause(
    settings: DataSettings, trap: type, cause: str, monkeypatch
):
    monkeypatch.setattr("dmtjepa.data.build.FolderSource", trap)
    loader = build_loader(settings.model_copy(update={"num_workers": 1, "worker_timeout": 1}), seed=0)

    def wait(done: threading.Event, count_progress: Callable[[], int], timeout: float) -> bool:
        """No second is counted before the worker is in the trap, however slow the machine is."""
        while not trap.sprung(loader) and not done.wait(0.01):
            pass
        return wait_for_progress(done, count_progress, timeout)

    monkeypatch.setattr("dmtjepa.data.loaders.pil.wait_for_progress", wait)
    with pytest.raises(DataError, match=cause) as error:
        list(loader.epoch(0))
    assert loader.num_images == 30
    assert trap(settings.path).name(11) in str(error.value)


def started(settings: DataSettings) -> tuple[PilLoader, Iterator[torch.Tensor]]:
    """A loader whose worker has loaded as many batches ahead as it may, and the rest of its epoch."""
    loader = build_loader(settings.model_copy(update={"num_workers": 1}), seed=0)
    images = loader.epoch(0)
    next(images)
    while int(loader._maker.progress[0, 0]) < settings.batch_size * (1 + _PREFETCH):
        time.sleep(0.01)
    loader._settings = settings.model_copy(update={"num_workers": 1, "worker_timeout": 1})
    return loader, images


@pytest.mark.slow
def test_a_stopped_worker_ends_the_run_though_its_batches_wait(settings: DataSettings):
    """To take over a batch that is there this process needs an answer from the worker, which no timeout covers."""
    loader, images = started(settings)
    os.kill(loader._batches._workers[0].pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="no worker has finished an image"):
        list(images)


def test_a_workers_death_is_told_where_data_are_asked_for(settings: DataSettings):
    """Not amid whatever this process is at, where nobody can tell what it has to do with data."""
    loader, images = started(settings)
    worker = loader._batches._workers[0]
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # torch's handler would raise here
    with pytest.raises(DataError, match="a worker was ended by SIGKILL"):
        list(images)


def test_a_worker_that_cannot_pass_on_its_batch_lacks_open_files(settings: DataSettings):
    """Without one, the thread that hands over shared memory ends, and this process reads the end of its answer."""
    loader, images = started(settings)
    kept = loader._batches

    class HungUp:
        _workers = kept._workers

        def __next__(self) -> None:
            raise EOFError

    loader._batches = HungUp()
    with pytest.raises(DataError, match=r"as many open files as it may have .*ulimit -n.*cannot pass on its batch"):
        next(images)


def test_an_error_of_a_worker_that_is_no_images_fault_is_raised(settings: DataSettings, monkeypatch):
    def fail(self: FolderSource, image: int) -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr(FolderSource, "read", fail)
    with pytest.raises(RuntimeError, match="a bug") as error:
        next(build_loader(settings.model_copy(update={"num_workers": 1}), seed=0).epoch(0))
    assert not isinstance(error.value, DataError)


@pytest.mark.slow
def test_shared_memory_that_is_full_is_told_of(settings: DataSettings, monkeypatch):
    def fail(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    loader = build_loader(settings.model_copy(update={"num_workers": 1}), seed=0)
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(DataError, match=r"no shared memory for a batch of 0\.0 MB .*--shm-size"):
        next(loader.epoch(0))
    loader.close()


@pytest.mark.slow
def test_a_process_that_ends_without_closing_its_loader_does_not_wait_for_the_workers(settings: DataSettings):
    """Which leave SIGTERM to the trainer, but not when it is the trainer that sends it."""
    stuck = f"""if True:
        import time
        from dmtjepa.config import DataSettings
        from dmtjepa.data import FolderSource, build_loader

        read = FolderSource.read
        FolderSource.read = lambda self, image: time.sleep(3600) if image == 11 else read(self, image)
        loader = build_loader(DataSettings(**{settings.model_dump()!r} | {{"num_workers": 1}}), seed=0)
        next(loader.epoch(0, {where(settings, 11)}))
        raise SystemExit("left")
    """
    done = subprocess.run([sys.executable, "-c", stuck], capture_output=True, text=True, timeout=300)
    assert done.stderr.strip().endswith("left")


@pytest.mark.slow
@pytest.mark.parametrize("loader_name", LOADERS)
def test_a_job_that_was_suspended_as_a_whole_has_not_stalled(settings: DataSettings, loader_name: str):
    slow = f"""if True:
        import time
        from dmtjepa.config import DataSettings
        from dmtjepa.data import FolderSource, build_loader

        read = FolderSource.read
        FolderSource.read = lambda self, image: time.sleep(0.25) or read(self, image)
        changes = {{"num_workers": 1, "worker_timeout": 6, "loader": {loader_name!r}}}
        loader = build_loader(DataSettings(**{settings.model_dump()!r} | changes), seed=0)
        for images in loader.epoch(0, 4):
            print(len(images), flush=True)
    """
    command = [sys.executable, "-c", slow]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"4\n"
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(9)  # longer than worker_timeout
    os.killpg(process.pid, signal.SIGCONT)
    rest, errors = process.communicate(timeout=300)
    assert (rest, process.returncode) == (b"4\n4\n", 0), errors.decode()


def where(settings: DataSettings, image: int) -> int:
    """The step before the one in which an image comes."""
    order = SampleOrder(30, settings.batch_size, seed=0)
    return next(step for step in range(1, 7) if image in order.request(0, step).images) - 1


def test_a_clusters_signals_leave_the_workers_alone(settings: DataSettings):
    loader = build_loader(settings.model_copy(update={"num_workers": 2}), seed=0)
    images = loader.epoch(0)
    next(images), next(images)  # one of each worker: both have started
    workers = loader._batches._workers
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid, number)
    assert len(list(images)) == 5
    del images
    loader.close()
    for worker in workers:
        worker.join(300)
        assert not worker.is_alive()


def test_colour_settings_change_the_pixels(settings: DataSettings):
    plain = batches(settings)[0]
    colored = settings.model_copy(update={"use_color_distortion": True, "color_jitter_strength": 0.5})
    blurred = settings.model_copy(update={"use_gaussian_blur": True})
    assert not torch.equal(batches(colored)[0], plain)
    assert not torch.equal(batches(blurred)[0], plain)
    assert torch.equal(batches(colored)[0], batches(colored)[0])
