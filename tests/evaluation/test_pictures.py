from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dmtjepa.evaluation import pictures
from dmtjepa.evaluation.pictures import LossCurve, PictureData

GRID = (4, 6)


@pytest.fixture
def full():
    """Everything there is to show, for 3 images of 32x48 pixels with 4x6 patches of 8."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.tensor([[0, 1, 6, 7], [9, 10, 15, 16]])
    return PictureData(
        grid_size=GRID,
        images=torch.randint(256, (3, 3, 32, 48), dtype=torch.uint8, generator=generator),
        context_index=torch.tensor([2, 3, 8]).expand(3, -1),
        target_index=blocks.expand(3, -1, -1),
        query_index=torch.tensor([7, 10]),
        neighbor_index=torch.tensor([[0, 1, 8, -1], [9, 11, 4, 16]]).expand(3, -1, -1),
        patches=torch.randn(3, 24, 16, generator=generator),
        untrained_patches=torch.randn(3, 24, 16, generator=generator),
        loss=LossCurve(np.linspace(0, 2, 100), np.linspace(1, 0.2, 100)),
        accuracy={"trained": {5: 0.7, 10: 0.8}, "untrained": {5: 0.4, 10: 0.5}, "pixels": {5: 0.3, 10: 0.3}},
        chance=0.1,
    )


def test_writes_a_composite_and_one_file_for_each_picture(full, tmp_path):
    paths = pictures.save_pictures(full, tmp_path / "report", "a run")
    assert [path.name for path in paths] == [
        "report.png",
        "loss.png",
        "accuracy.png",
        "masks.png",
        "neighbors.png",
        "pca.png",
    ]
    sizes = []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.std() > 10  # something is drawn
        sizes.append(pixels.shape[:2])
    assert sizes[0][0] > sum(height for height, _ in sizes[3:])  # the composite holds the strips one above the other


def test_leaves_out_what_there_is_no_data_for(full, tmp_path):
    only_loss = PictureData(grid_size=GRID, loss=full.loss)
    assert [p.name for p in pictures.save_pictures(only_loss, tmp_path / "a", "")] == ["report.png", "loss.png"]
    plain = PictureData(grid_size=GRID, images=full.images, patches=full.patches)
    assert [p.name for p in pictures.save_pictures(plain, tmp_path / "b", "")] == ["report.png", "pca.png"]
    assert pictures.save_pictures(PictureData(grid_size=GRID), tmp_path / "c", "") == []
    assert not (tmp_path / "c").exists()


def test_target_blocks_are_outlined_where_they_are(full):
    axes = Figure().subplots()
    pictures.draw_masks(axes, full.images[0], full.context_index[0], full.target_index[0], GRID)
    outlines = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    assert len(outlines) == 2
    for outline, corner in zip(outlines, [(0, 0), (24, 8)], strict=True):
        assert outline.get_xy() == pytest.approx((corner[0] - 0.5, corner[1] - 0.5), abs=1)
        assert (outline.get_width(), outline.get_height()) == pytest.approx((16, 16), abs=2)
    shown = axes.images[0].get_array().astype(int)
    image = full.images[0].permute(1, 2, 0).numpy().astype(int)
    assert np.array_equal(shown[0:8, 16:32], image[0:8, 16:32])  # context patches 2 and 3 as they are
    assert shown[16:, :].min() > 150  # outside of the context the image is pale


def test_contexts_of_different_lengths(full):
    figure = Figure()
    contexts = [torch.tensor([2, 3, 8]), torch.tensor([2]), torch.tensor([3, 8, 12, 13])]
    pictures._draw_mask_strip(figure, replace(full, context_index=contexts))
    assert "context (1 to 4 patches)" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_an_arrow_leads_to_every_neighbour_that_exists(full):
    axes = Figure().subplots()
    pictures.draw_neighbors(axes, full.images[0], full.query_index, full.neighbor_index[0], GRID, window=3)
    ends = [annotation.xy for annotation in axes.texts]
    expected = [(8 * (n % 6) + 3.5, 8 * (n // 6) + 3.5) for n in (0, 1, 8, 9, 11, 4, 16)]
    assert ends == expected


def test_accuracy_has_a_labelled_bar_for_every_number(full):
    axes = Figure().subplots()
    pictures.draw_accuracy(axes, full.accuracy, full.chance)
    assert [text.get_text() for text in axes.texts] == ["70.0", "80.0", "40.0", "50.0", "30.0", "30.0"]
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"trained", "untrained", "pixels", "most frequent class"}


def test_smoothed_loss_is_the_running_mean(full):
    axes = Figure().subplots()
    pictures.draw_loss(axes, full.loss)
    raw, smooth = axes.lines
    assert len(raw.get_xdata()) == 100
    # Of a straight line the running mean is the line itself.
    at = np.interp(smooth.get_xdata(), raw.get_xdata(), raw.get_ydata())
    np.testing.assert_allclose(smooth.get_ydata(), at, atol=0.01)


def test_loss_of_one_step_and_of_nan_is_drawn(tmp_path):
    for loss in ([0.5], [0.5, float("nan"), 0.4]):
        curve = LossCurve(np.arange(len(loss)) / 10, np.array(loss))
        assert pictures.save_pictures(PictureData(grid_size=GRID, loss=curve), tmp_path, "")


def test_losses_are_read_from_the_released_csv(tmp_path):
    path = tmp_path / "jepa_r0.csv"
    header = "epoch,itr,loss,mask-A,mask-B,time (ms)\n"
    # As after a kill: a line cut short, then a second header.
    path.write_text(
        header + "1,0,0.50000,50,30,9\n1,1,0.40000,50,30,9\n2,0,0.3\n2,1,\n" + header + "2,1,0.20000,50,30,9\n"
    )
    curve = pictures.read_losses(path)
    assert curve.epoch.tolist() == [0, 0.5, 1, 1.5]
    assert curve.loss.tolist() == [0.5, 0.4, 0.3, 0.2]
    path.write_text(header)
    assert len(pictures.read_losses(path).loss) == 0
    path.write_text("step,value\n1,2\n")
    with pytest.raises(ValueError, match="no column epoch, itr, loss"):
        pictures.read_losses(path)


def test_principal_components_tell_three_kinds_of_patches_apart():
    """Two images whose patches are of three kinds: each kind has its own colour, in both images."""
    kinds = torch.arange(48).view(2, 24) % 3
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    patches = directions[kinds] + 0.01 * torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    colors = pictures.pca_colors(patches, GRID)
    assert colors.shape == (2, 4, 6, 3)
    assert colors.min() >= 0
    assert colors.max() <= 1
    means = np.stack([colors.reshape(48, 3)[kinds.flatten().numpy() == kind] for kind in range(3)])
    assert means[:, :, :2].std(axis=1).max() < 0.1
    distances = [np.abs(means[a].mean(0) - means[b].mean(0)).max() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) > 0.4


@pytest.mark.parametrize("grid_size", [(6, 6), (14, 14), (9, 14), (16, 16)])
def test_windows_of_queries_lie_on_the_grid_and_apart(grid_size):
    queries = pictures.pick_queries(grid_size)
    rows, columns = queries // grid_size[1], queries % grid_size[1]
    assert rows.min() >= 1
    assert columns.min() >= 1
    assert rows.max() <= grid_size[0] - 2
    assert columns.max() <= grid_size[1] - 2
    for i in range(len(queries)):
        for j in range(i):
            assert max(abs(rows[i] - rows[j]), abs(columns[i] - columns[j])) >= 2
