import pytest
import torch
import torch.nn.functional as F

from dmtjepa.evaluation.attentive import AttentiveProbe, fit_attentive
from dmtjepa.evaluation.errors import EvaluationError
from dmtjepa.evaluation.linear import fit_linear


def make_images(n, seed, num_patches=9, dim=24):
    """Patches of noise, one of which is marked and shows the class in its sign; its place is random."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(n, num_patches, dim, generator=generator)
    labels = torch.randint(2, (n,), generator=generator)
    place = torch.randint(num_patches, (n,), generator=generator)
    marked = torch.zeros(n, dim)
    marked[:, 0], marked[:, 1] = 6.0, 2.0 * (2 * labels - 1)
    patches[torch.arange(n), place] = marked
    return patches, labels


@pytest.mark.slow
def test_attention_finds_the_patch_that_an_average_hides():
    (train, train_labels), (patches, labels) = make_images(600, 0), make_images(300, 1)
    average = fit_linear(train.mean(1), train_labels).accuracy(patches.mean(1), labels)
    state = torch.random.get_rng_state()
    probe = fit_attentive(train, train_labels)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert average < 0.85
    assert probe.accuracy(patches, labels) > 0.95


def test_pooling_is_the_cross_attention_of_one_query():
    """With keys and values of their own, as V-JEPA computes it."""
    torch.manual_seed(0)
    dim, heads = 128, 2
    probe = AttentiveProbe(3, torch.randn(dim), 1 + torch.rand(dim), torch.Generator().manual_seed(0))
    assert probe.query.shape == (heads, dim)
    patches = torch.randn(4, 7, dim)
    x = (patches - probe.mean) / probe.scale
    keys = torch.randn(heads, dim, dim // heads)  # W_k of each head
    query = torch.linalg.lstsq(keys.transpose(1, 2) @ keys, keys.transpose(1, 2) @ probe.query[..., None]).solution
    # The absorbed query need not lie in the range of W_k: project it there.
    probe.query.data = (keys @ query)[..., 0]
    k, v = (torch.einsum("bnd,hde->bhne", x, weight) for weight in (keys, probe.value.data))
    q = query.transpose(1, 2).expand(4, -1, -1, -1)
    expected = F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, :, 0].flatten(1)
    torch.testing.assert_close(probe.pool(patches), expected, atol=1e-4, rtol=1e-4)


def test_refuses_too_few_images():
    with pytest.raises(EvaluationError, match="at least 10 labelled images, not 9"):
        fit_attentive(torch.randn(9, 4, 8), torch.zeros(9, dtype=torch.int64))
