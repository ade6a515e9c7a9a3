"""select_neighbors: every implementation against the reference.

With features whose arithmetic is exact the choice, its order and its ties must be the reference's. With random features
rounding may swap candidates of nearly the same similarity, so there the similarities of the chosen must agree, rank by
rank, to the rounding of float32 sums, which also allows nothing but near-ties to be chosen differently.
"""

import pytest
import torch

from dmtjepa.kernels import plain, select_neighbors
from dmtjepa.kernels.select_neighbors import select_neighbors_op, select_neighbors_reference

CASES = [  # grid, window, border, k
    ((3, 3), 3, "wrap", 4),
    ((3, 3), 3, "clip", 8),
    ((6, 6), 3, "clip", 1),
    ((5, 7), 5, "wrap", 4),
    ((9, 14), 3, "wrap", 8),
    ((6, 5), 5, "clip", 8),
    ((7, 7), 7, "wrap", 8),
    ((7, 9), 7, "clip", 4),
]
CASES = [
    pytest.param(
        *case,
        id=f"{case[0][0]}x{case[0][1]}-w{case[1]}-{case[2]}-k{case[3]}",
        marks=[pytest.mark.slow] if place >= 4 else [],
    )
    for place, case in enumerate(CASES)
]


def signs(num_images, grid_size, dim=16):
    """Features of +-1 in a few patterns: products, norms and quotients are exact, and ties are everywhere."""
    generator = torch.Generator().manual_seed(0)
    patterns = 1.0 - 2.0 * torch.randint(0, 2, (5, dim), generator=generator)
    chosen = torch.randint(0, 5, (num_images, grid_size[0] * grid_size[1]), generator=generator)
    return patterns[chosen]


def some_patches(num_images, num_patches):
    """A third of all patches, unsorted, the first and last among them."""
    chosen = torch.randperm(num_images * num_patches, generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([num_images * num_patches - 1, 0])
    return torch.cat([chosen[: len(chosen) // 3], ends])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("grid_size", "window", "border", "k"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_features(device, grid_size, window, border, k, dtype):
    h = signs(2, grid_size).to(device, dtype)
    patches = some_patches(2, grid_size[0] * grid_size[1]).to(device)
    found = select_neighbors(h, patches, grid_size, k, window, border)
    assert found.dtype == torch.int64
    assert torch.equal(found, select_neighbors_reference(h, patches, grid_size, k, window, border))


def similarity_of(h, patches, neighbor_index):
    unit = torch.nn.functional.normalize(h.double(), dim=-1).flatten(0, 1)
    similarity = (unit[patches][:, None] * unit[neighbor_index.clamp_min(0)]).sum(-1)
    return similarity.masked_fill(neighbor_index < 0, -2.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("grid_size", "window", "border", "k"), CASES)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 24), (torch.bfloat16, 80), (torch.float16, 24)])
def test_random_features(device, grid_size, window, border, k, dtype, dim):
    torch.manual_seed(0)
    num_patches = grid_size[0] * grid_size[1]
    h = torch.randn(2, num_patches, dim).to(device, dtype)
    patches = some_patches(2, num_patches).to(device, torch.int32)
    neighbor_index = select_neighbors(h, patches, grid_size, k, window, border)
    expected = select_neighbors_reference(h, patches, grid_size, k, window, border)
    assert torch.equal(neighbor_index < 0, expected < 0)
    for u, neighbors in enumerate(neighbor_index.tolist()):
        chosen = [n for n in neighbors if n >= 0]
        assert len(set(chosen)) == len(chosen)
        assert int(patches[u]) not in chosen
        assert all(n // num_patches == int(patches[u]) // num_patches for n in chosen)
    found_similarity = similarity_of(h, patches, neighbor_index)
    torch.testing.assert_close(found_similarity, similarity_of(h, patches, expected), rtol=0, atol=2e-6)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("patches", [[], [4], list(range(9))], ids=["none", "one", "all"])
def test_covered_patches_of_one_image(device, patches):
    h = signs(1, (3, 3)).to(device)
    patches = torch.tensor(patches, dtype=torch.int64, device=device)
    found = select_neighbors(h, patches, (3, 3))
    assert found.shape == (len(patches), 4)
    assert torch.equal(found, select_neighbors_reference(h, patches, (3, 3)))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(device, layout):
    h = signs(2, (6, 6)).to(device)
    h = {
        "transposed": h.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([h, -h], dim=2)[:, :, 8:24],
        "expanded": h[:1].expand(2, -1, -1),
    }[layout]
    patches = some_patches(2, 36).to(device)
    strided = torch.stack([patches, patches], 1)[:, 1]
    found = select_neighbors(h, strided, (6, 6), 8)
    assert torch.equal(found, select_neighbors_reference(h, patches, (6, 6), 8))


def test_scale_of_a_patch_does_not_matter(device):
    h = signs(1, (4, 4)).to(device)
    scaled = h * 4.0 ** torch.arange(16, device=device).sub(8)[None, :, None]
    patches = torch.arange(16, device=device)
    assert torch.equal(select_neighbors(scaled, patches, (4, 4), 8), select_neighbors(h, patches, (4, 4), 8))


def test_zeros_and_not_a_number(device):
    h = signs(1, (3, 3)).to(device)
    h[0, 0] = 0.0
    h[0, 8] = float("nan")
    patches = torch.arange(9, device=device)
    neighbor_index = select_neighbors(h, patches, (3, 3), 8)
    assert (neighbor_index >= 0).all()
    assert (neighbor_index[:8, -1] == 8).all()
    # All similarities of a patch of zeros are 0 or NaN, those of one of NaN are all NaN: ties.
    assert neighbor_index[0].tolist() == list(range(1, 9))
    assert neighbor_index[8].tolist() == list(range(8))


def test_float64_on_the_cpu():
    h = torch.randn(2, 36, 24, dtype=torch.float64)
    patches = torch.arange(72)
    expected = select_neighbors_reference(h, patches, (6, 6), 8, 5)
    for function in (select_neighbors, plain.select_neighbors):
        assert torch.equal(function(h, patches, (6, 6), 8, 5), expected)


@pytest.mark.slow
def test_opcheck(device):
    h = torch.randn(2, 36, 16, device=device)
    patches = some_patches(2, 36).to(device)
    torch.library.opcheck(select_neighbors_op, (h, patches, 6, 6, 4, 3, "clip"))


@pytest.mark.slow
def test_fullgraph(device):
    h = torch.randn(2, 36, 16, device=device, requires_grad=True)
    patches = some_patches(2, 36).to(device)

    def step(h, patches):
        return select_neighbors(h * 2, patches, (6, 6)) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_covered in (20, 10, 3):
        found, expected = (function(h, patches[:num_covered]) for function in (compiled, step))
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_offsets_beyond_32_bits(device):
    # 2**31 elements apart: an element offset in 32 bits would be negative. Only a few pages are ever touched.
    memory = torch.empty(2**31 + 9 * 16, dtype=torch.bfloat16, device=device)
    h = memory.as_strided((3, 9, 16), (2**30, 16, 1))
    h.copy_(signs(3, (3, 3)))
    patches = torch.tensor([0, 13, 26], device=device)
    expected = select_neighbors_reference(h.contiguous(), patches, (3, 3))
    assert torch.equal(select_neighbors(h, patches, (3, 3)), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"h": torch.zeros(36, 8)}, ValueError, "h must have 3 dimensions"),
        ({"h": torch.zeros(1, 36, 8, dtype=torch.int32)}, TypeError, "h must be one of"),
        ({"patches": torch.zeros(3)}, TypeError, "patches must be one of"),
        ({"patches": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "patches must have 1 dimensions"),
        ({"patches": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "patches is on meta"),
        ({"grid_size": (6, 5)}, ValueError, "36 patches per image but the grid is 6 x 5"),
        ({"window": 4}, ValueError, "window must be 3, 5 or 7, got 4"),
        ({"window": 7}, ValueError, "window 7 is larger than the grid of 6 x 6"),
        ({"num_neighbors": 9}, ValueError, "num_neighbors must be between 1 and 8"),
        ({"num_neighbors": 0}, ValueError, "num_neighbors must be between 1 and 8"),
        ({"border": "reflect"}, ValueError, 'border must be "wrap" or "clip"'),
    ],
)
def test_misuse(arguments, error, message):
    patches = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(error, match=message):
        select_neighbors(**{"h": torch.zeros(1, 36, 8), "patches": patches, "grid_size": (6, 6), **arguments})


def test_patch_out_of_range_in_debug_mode(device, monkeypatch):
    monkeypatch.setattr("dmtjepa.kernels.checks.DEBUG", True)
    h = torch.zeros(2, 36, 8, device=device)
    with pytest.raises(IndexError, match=r"patches has entries in \[0, 72\], outside \[0, 71\]"):
        select_neighbors(h, torch.tensor([0, 72], device=device), (6, 6))
