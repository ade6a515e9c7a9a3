import numpy as np
import pytest
from PIL import Image

from dmtjepa.evaluation import figures
from dmtjepa.evaluation.figures import FigureData
from dmtjepa.step_csv import LossCurve

GRID = (4, 6)


@pytest.mark.slow
def test_writes_a_composite_and_one_file_for_each_picture(everything, tmp_path):
    paths = figures.save_figures(everything, tmp_path / "report", "a run")
    assert [path.name for path in paths] == [
        "report.png",
        "loss.png",
        "accuracy.png",
        "masks.png",
        "neighbors.png",
        "pca.png",
        "nearest.png",
        "segmentation.png",
    ]
    sizes = []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.std() > 10  # something is drawn
        sizes.append(pixels.shape[:2])
    assert sizes[0][0] > sum(height for height, _ in sizes[3:])  # the composite holds the strips one above the other


@pytest.mark.slow
def test_leaves_out_what_there_is_no_data_for(everything, tmp_path):
    only_loss = FigureData(grid_size=GRID, loss=everything.loss)
    assert [p.name for p in figures.save_figures(only_loss, tmp_path / "a", "")] == ["report.png", "loss.png"]
    plain = FigureData(grid_size=GRID, images=everything.images, patches=everything.patches)
    assert [p.name for p in figures.save_figures(plain, tmp_path / "b", "")] == ["report.png", "pca.png"]
    assert figures.save_figures(FigureData(grid_size=GRID), tmp_path / "c", "") == []
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_loss_of_one_step_and_of_nan_is_drawn(tmp_path):
    for loss in ([0.5], [0.5, float("nan"), 0.4]):
        curve = LossCurve(np.arange(len(loss)) / 10, np.array(loss))
        assert figures.save_figures(FigureData(grid_size=GRID, loss=curve), tmp_path, "a$\\foo$\udcff")  # of any folder
