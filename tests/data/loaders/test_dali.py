"""The loader `dali` against `pil`: same samples, same boxes, the same pixels within a tolerance."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps

from dmtjepa.config import DataSettings
from dmtjepa.data import DataError, FolderSource, build_loader
from dmtjepa.data.decode import decode_image
from dmtjepa.data.jpeg_header import read_plain_size
from dmtjepa.data.loaders.base import wait_for_progress
from tests.helpers.images import encode, flip_bytes, needs_dali, smooth_image

pytestmark = needs_dali


def use(settings: DataSettings, **changes: object) -> DataSettings:
    return settings.model_copy(update={"loader": "dali", "num_workers": 2, **changes})


def batches(settings: DataSettings, epoch: int = 0, start_step: int = 0, **options: object) -> list[torch.Tensor]:
    loader = build_loader(settings, **{"seed": 7, **options})
    result = list(loader.epoch(epoch, start_step))
    loader.close()
    return result


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
    """Absolute difference of two epochs, in grey levels."""
    return (torch.cat(ours).cpu().int() - torch.cat(theirs).int()).abs().float()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_size": (32, 48), "use_horizontal_flip": True},
        {"use_color_distortion": True, "color_jitter_strength": 0.5, "use_gaussian_blur": True},
    ],
    ids=["plain", "flip", "color"],
)
def test_pixels_agree_with_pil(settings: DataSettings, changes: dict):
    """Stated in docs/data.md: on a CPU at most 2 grey levels, 0.1 on average, before colours are distorted."""
    theirs = batches(settings.model_copy(update={"loader": "pil", **changes}))
    apart = difference(batches(use(settings, **changes)), theirs)
    assert apart.mean() < 0.1
    assert apart.max() <= (2 if "use_color_distortion" not in changes else 8)


def test_the_pipeline_of_a_gpu_stays_on_it(settings: DataSettings, monkeypatch):
    """It can be defined without a GPU, not built: nothing but encoded bytes and boxes comes from the host."""
    from dmtjepa.data.loaders import dali_pipeline

    outputs, decoders = [], []
    decode = dali_pipeline.fn.decoders.image_slice
    monkeypatch.setattr(dali_pipeline.fn.decoders, "image_slice", lambda *a, **k: decoders.append(k) or decode(*a, **k))
    monkeypatch.setattr(dali_pipeline.Pipeline, "set_outputs", lambda self, *nodes: outputs.append((self, *nodes)))
    monkeypatch.setattr(dali_pipeline.Pipeline, "build", lambda self: None)
    dali_pipeline.Decoder(use(settings, hw_decoder_load=0.55), torch.device("cuda", 3), in_flight=2).close()
    ((pipeline, images),), (options,) = outputs, decoders
    assert pipeline.device_id == 3
    assert pipeline.exec_dynamic  # what makes outputs that live as long as they are held
    assert options["device"] == "mixed"
    assert options["hw_decoder_load"] == 0.55
    assert images.device == "gpu"


@pytest.fixture
def _whole_graph(monkeypatch):
    """What a GPU runs, on the CPU: DALI's own resizing, too."""
    from dmtjepa.data.loaders import dali

    monkeypatch.setattr(
        dali, "Decoder", lambda *rest, whole=dali.Decoder, **named: whole(*rest, **{**named, "dali_resize": True})
    )


@pytest.mark.usefixtures("_whole_graph")
def test_resize_within_dali_agrees_too(settings: DataSettings):
    flipped = use(settings, use_horizontal_flip=True)
    theirs = batches(flipped.model_copy(update={"loader": "pil"}))
    ours = batches(flipped)
    assert ours[0].is_contiguous()
    apart = difference(ours, theirs)
    assert apart.mean() < 0.6
    assert apart.max() <= 3


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch) -> DataSettings:
    if "DMTJEPA_TEST_DATA" not in os.environ:
        pytest.skip("DMTJEPA_TEST_DATA is not set")
    monkeypatch.setenv("DMTJEPA_CACHE", str(tmp_path))
    sample = os.path.join(os.environ["DMTJEPA_TEST_DATA"], "imagenet-sample-250.tar")
    return DataSettings(root_path=sample, batch_size=50, num_workers=2, loader="pil")


@pytest.mark.slow
def test_photographs_agree_with_pil(photographs: DataSettings):
    apart = difference(batches(use(photographs)), batches(photographs))
    assert apart.mean() < 0.1
    assert apart.max() <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("_whole_graph")
def test_photographs_agree_where_dali_resizes_too(photographs: DataSettings):
    """But for single pixels, where the two round the rim of the filter differently."""
    apart = difference(batches(use(photographs)), batches(photographs))
    assert apart.mean() < 0.25
    assert (apart > 2).float().mean() < 1e-3
    assert apart.max() <= 24


@pytest.mark.slow
def test_ranks_and_runs_agree_and_resume_is_exact(settings: DataSettings):
    whole = batches(use(settings), epoch=3)
    assert len(whole) == 7
    for start in (1, 6, 7):
        rest = batches(use(settings), epoch=3, start_step=start)
        assert len(rest) == 7 - start
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    for world_size, start in ((2, 0), (4, 0), (2, 3)):  # also what one process began
        changed = use(settings, batch_size=4 // world_size)
        ranks = [batches(changed, 3, start, rank=rank, world_size=world_size) for rank in range(world_size)]
        for one, *parts in zip(whole[start:], *ranks, strict=True):
            assert torch.equal(one, torch.cat(parts))


def test_resume_reads_nothing_skipped(settings: DataSettings, monkeypatch):
    read = []
    original = FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, image: read.append(image) or original(self, image))
    from dmtjepa.data.loaders import dali

    monkeypatch.setattr(dali, "_READ_AHEAD", 1)
    loader = build_loader(use(settings), seed=7)
    next(loader.epoch(0, 6))
    loader.close()
    assert 4 <= len(read) <= 4 * (1 + dali._IN_FLIGHT + dali._READ_AHEAD)


def test_epochs_follow_each_other_and_batches_stay_as_they_are(settings: DataSettings):
    """DALI's memory is not used again while a batch is held."""
    loader = build_loader(use(settings), seed=7)
    held = [images for epoch in range(4) for images in loader.epoch(epoch)]
    copies = [images.clone() for images in held]
    list(loader.epoch(4))
    loader.close()
    expected = [images for epoch in range(4) for images in batches(use(settings), epoch=epoch)]
    for images, copy, again in zip(held, copies, expected, strict=True):
        assert torch.equal(images, copy)
        assert torch.equal(images, again)


@pytest.mark.slow
def test_damage_that_dali_refuses_depends_on_no_history(tmp_path: Path, monkeypatch):
    """A resumed run meets a refused image in other company, and gives the same pixels.

    One that starts at the batch after a refused one shows whether the batches in flight were decoded otherwise. PIL
    would give nearly the pixels of DALI; here it gives their negative.
    """
    monkeypatch.setattr("dmtjepa.data.loaders.reader.decode_image", lambda *a: ImageOps.invert(decode_image(*a)))
    rng = np.random.default_rng(3)
    sound, damaged = tmp_path / "sound", tmp_path / "damaged"
    for folder in (sound, damaged):
        folder.mkdir()
    for number in range(60):
        data = encode(smooth_image(rng, 50, 40), "JPEG")
        (sound / f"{number:02d}.jpg").write_bytes(data)
        (damaged / f"{number:02d}.jpg").write_bytes(flip_bytes(data, rng) if number % 5 == 0 else data)
    settings = DataSettings(root_path=str(damaged), batch_size=6, crop_size=32, loader="dali", max_broken=1)
    loader = build_loader(settings, seed=0)
    whole = [images for epoch in range(2) for images in loader.epoch(epoch)]
    assert loader.corrupt
    loader.close()
    expected = batches(settings.model_copy(update={"root_path": str(sound)}), seed=0)
    changed = [int((a != b).flatten(1).any(1).sum()) for a, b in zip(whole, expected, strict=False)]
    assert 0 < sum(changed) <= 12  # the company of a refused image is decoded by DALI
    for start in range(1, 10):
        rest = batches(settings, epoch=1, start_step=start, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(whole[10 + start :], rest, strict=True))


def test_a_refused_image_that_is_in_the_batch_twice(tmp_path: Path, monkeypatch):
    """A corrupt image can be replaced by one that the batch holds already, and that DALI refuses."""
    rng = np.random.default_rng(5)
    refused = bytearray(encode(smooth_image(rng, 50, 40), "JPEG"))
    table = refused.index(b"\xff\xdb")
    refused[table + 4] = 0x5C  # a quantisation table of no number
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(encode(smooth_image(rng, 50, 40), "JPEG"))
    (tmp_path / "4.jpg").write_bytes(refused)
    (tmp_path / "5.jpg").write_bytes(b"no image")
    assert read_plain_size(bytes(refused)) == (50, 40)

    def candidates(image: int, *rest: int) -> list[int]:
        return {5: [5, 4, 0], 4: [4, 1]}.get(image, [image])

    monkeypatch.setattr("dmtjepa.data.loaders.reader.candidate_images", candidates)
    settings = DataSettings(root_path=str(tmp_path), batch_size=6, crop_size=32, loader="dali", max_broken=1)
    (images,) = batches(settings)
    assert len(images) == 6


@pytest.mark.slow
def test_a_stalled_read_ends_the_run_with_its_cause(settings: DataSettings, monkeypatch):
    class Stall(FolderSource):
        def read(self, image: int) -> bytes:
            if image == 11:
                time.sleep(3600)
            return super().read(image)

    monkeypatch.setattr("dmtjepa.data.build.FolderSource", Stall)
    loader = build_loader(use(settings, worker_timeout=1, num_workers=2), seed=0)

    def wait(done: threading.Event, count_progress: Callable[[], int], timeout: float) -> bool:
        """No second is counted before a thread is stuck, however slow the machine is."""
        while 11 not in loader._reader.current and not done.wait(0.01):
            pass
        return wait_for_progress(done, count_progress, timeout)

    monkeypatch.setattr("dmtjepa.data.loaders.dali.wait_for_progress", wait)
    with pytest.raises(DataError, match="no thread has finished an image") as error:
        list(loader.epoch(0))
    assert Stall(settings.path).name(11) in str(error.value)


def test_where_dali_does_not_work_auto_takes_pil(settings: DataSettings, monkeypatch, caplog):
    from dmtjepa.data.loaders import dali_pipeline

    def fail(self: object) -> None:
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(dali_pipeline.Pipeline, "build", fail)
    with pytest.raises(DataError, match=r"DALI cannot start on cpu, set data\.loader: pil \(CUDA driver"):
        build_loader(use(settings), seed=0)
    loader = build_loader(use(settings, loader="auto", num_workers=0), seed=0)
    assert type(loader).__name__ == "PilLoader"
    assert "does not work here" in caplog.text


def test_auto_takes_dali(settings: DataSettings, monkeypatch):
    assert type(build_loader(use(settings, loader="auto"), seed=0)).__name__ == "DaliLoader"
    monkeypatch.setattr("dmtjepa.data.build.is_dali_installed", lambda: False)
    assert type(build_loader(use(settings, loader="auto"), seed=0)).__name__ == "PilLoader"


def test_an_error_that_is_no_images_fault_is_raised(settings: DataSettings, monkeypatch):
    def fail(self: FolderSource, image: int) -> bytes:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(FolderSource, "read", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        next(build_loader(use(settings), seed=0).epoch(0))


@pytest.mark.gpu
def test_on_a_gpu_pixels_agree_and_memory_is_not_reused_too_early(settings: DataSettings):
    device = torch.device("cuda", 0)
    theirs = batches(settings.model_copy(update={"loader": "pil", "use_horizontal_flip": True}))
    ours = batches(use(settings, use_horizontal_flip=True), device=device)
    assert ours[0].device == device
    assert ours[0].is_contiguous()
    assert ours[0].dtype == torch.uint8
    apart = difference(ours, theirs)
    assert apart.mean() < 2
    assert apart.quantile(0.999) <= 16
    loader = build_loader(use(settings), seed=0, device=device)
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for images in loader.epoch(0):
        busy = busy @ busy / 4096  # the stream falls behind the loader
        sums.append(images.float().sum())
    loader.close()
    assert [int(total) for total in sums] == [
        int(images.float().sum()) for images in batches(use(settings), seed=0, device=device)
    ]
