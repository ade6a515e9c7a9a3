from types import SimpleNamespace

import pytest
import torch

from dmtjepa.data import build_eval_loader, open_images
from dmtjepa.evaluation.errors import NotMeasuredError
from dmtjepa.evaluation.retrieval import FeaturedImages, find_nearest

CONTEXT = SimpleNamespace(build_loader=lambda source: build_eval_loader(source, (32, 32), 4))


def test_nearest_images_are_those_with_the_most_similar_features(data):
    """Features are the mean colors of the images, which tell their classes apart."""
    train, validation = open_images(data / "train"), open_images(data / "val")
    (images, labels, names), *_ = build_eval_loader(validation, (32, 32), 12)
    gallery = torch.cat([batch for batch, _, _ in build_eval_loader(train, (32, 32), 30)])
    colors = [batch.float().mean((2, 3)) for batch in (gallery, images)]
    found = find_nearest(CONTEXT, FeaturedImages(train, colors[0]), colors[1], names, labels)
    assert found.images.shape == (12, 9, 3, 32, 32)
    assert found.classes == [[name] * 9 for name in found.query_classes]
    assert (found.similarity.diff(dim=1) <= 0).all()
    # The images are those whose similarity is given.
    std, mean = torch.std_mean(colors[0], dim=0, correction=0)
    query, nearest = ((color - mean) / std for color in (colors[1][5], found.images[5, 0].float().mean((1, 2))))
    assert torch.cosine_similarity(query, nearest, dim=0) == pytest.approx(found.similarity[5, 0].item(), abs=1e-4)


def test_an_image_is_not_its_own_neighbour(data):
    source = open_images(data / "val")
    (images, _, names), *_ = build_eval_loader(source, (32, 32), 12)
    colors = images.float().mean((2, 3))
    found = find_nearest(CONTEXT, FeaturedImages(source, colors), colors[:2], names[:2], None)
    assert found.classes is None
    assert all(not torch.equal(images[b], near) for b in range(2) for near in found.images[b])


def test_images_that_cannot_be_matched_are_not_shown(data):
    source = open_images(data / "val")
    with pytest.raises(NotMeasuredError, match="2 of 12 images cannot be read"):
        find_nearest(CONTEXT, FeaturedImages(source, torch.rand(10, 3)), torch.rand(1, 3), ["x"], None)


def test_a_list_with_an_image_twice_and_names_that_are_not_utf8(data, tmp_path):
    paths = sorted((data / "val").rglob("*.*"))[:4]
    paths = [path for path in paths if path.is_file()]
    lines = [f"{path}\t".encode() + b"caf\xe9" for path in [paths[0], *paths]]
    (tmp_path / "images.tsv").write_bytes(b"\n".join(lines))
    source = open_images(tmp_path / "images.tsv")
    colors, names = torch.rand(len(lines), 3), [source.name(0), source.name(2)]
    labels = torch.zeros(2, dtype=torch.int64)
    found = find_nearest(CONTEXT, FeaturedImages(source, colors), colors[[0, 2]], names, labels)
    assert found.images.shape[:2] == (2, len(paths) - 1)
    assert found.query_classes == ["caf\\xe9"] * 2
