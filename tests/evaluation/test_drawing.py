import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dmtjepa.evaluation import drawing

GRID = (4, 6)


def test_target_blocks_are_outlined_where_they_are(everything):
    axes = Figure().subplots()
    drawing.draw_masks(axes, everything.images[0], everything.context_index[0], everything.target_index[0], GRID)
    outlines = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    assert len(outlines) == 2
    for outline, corner in zip(outlines, [(0, 0), (24, 8)], strict=True):
        assert outline.get_xy() == pytest.approx((corner[0] - 0.5, corner[1] - 0.5), abs=1)
        assert (outline.get_width(), outline.get_height()) == pytest.approx((16, 16), abs=2)
    shown = axes.images[0].get_array().astype(int)
    image = everything.images[0].permute(1, 2, 0).numpy().astype(int)
    assert np.array_equal(shown[0:8, 16:32], image[0:8, 16:32])  # context patches 2 and 3 as they are
    assert shown[16:, :].min() > 150  # outside of the context the image is pale


def test_contexts_of_different_lengths(everything):
    figure = Figure()
    contexts = [torch.tensor([2, 3, 8]), torch.tensor([2]), torch.tensor([3, 8, 12, 13])]
    drawing.draw_mask_strip(figure, everything.images, contexts, everything.target_index, GRID)
    assert "context (1 to 4 patches)" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_an_arrow_leads_to_every_neighbour_that_exists(everything):
    image, queries, neighbors = everything.images[0], everything.query_index, everything.neighbor_index[0]
    axes = Figure().subplots()
    drawing.draw_neighbors(axes, image, queries, neighbors, GRID, window=3)
    ends = [annotation.xy for annotation in axes.texts]
    expected = [(8 * (n % 6) + 3.5, 8 * (n // 6) + 3.5) for n in (0, 1, 8, 9, 11, 4, 16)]
    assert ends == expected


def test_accuracy_has_a_labelled_bar_for_every_number(everything):
    axes = Figure().subplots()
    drawing.draw_accuracy(axes, everything.accuracy, everything.chance)
    assert [text.get_text() for text in axes.texts] == ["70.0", "80.0", "40.0", "50.0", "30.0", "30.0"]
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"trained", "untrained", "pixels", "most frequent class"}
    drawing.draw_accuracy(axes, everything.accuracy | {"trained, with layout": {5: 0.9, 10: 0.95}}, None)
    pooled, *_, layout = axes.containers[3:]
    assert [bar.get_facecolor() for bar in layout] == [bar.get_facecolor() for bar in pooled]
    assert [bar.get_hatch() for bar in layout] == ["///"] * 2


def test_smoothed_loss_is_the_running_mean(everything):
    axes = Figure().subplots()
    drawing.draw_loss(axes, everything.loss.epoch, everything.loss.loss)
    raw, smooth = axes.lines
    assert len(raw.get_xdata()) == 100
    # Of a straight line the running mean is the line itself.
    at = np.interp(smooth.get_xdata(), raw.get_xdata(), raw.get_ydata())
    np.testing.assert_allclose(smooth.get_ydata(), at, atol=0.01)


def test_principal_components_tell_three_kinds_of_patches_apart():
    """Two images whose patches are of three kinds: each kind has its own colour, in both images."""
    kinds = torch.arange(48).view(2, 24) % 3
    directions = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    patches = directions[kinds] + 0.01 * torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    colors = drawing.pca_colors(patches, GRID)
    assert colors.shape == (2, 4, 6, 3)
    assert colors.min() >= 0
    assert colors.max() <= 1
    means = np.stack([colors.reshape(48, 3)[kinds.flatten().numpy() == kind] for kind in range(3)])
    assert means[:, :, :2].std(axis=1).max() < 0.1
    distances = [np.abs(means[a].mean(0) - means[b].mean(0)).max() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert min(distances) > 0.4
