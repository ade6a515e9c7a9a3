"""Compilation, sharding and their order."""

import functools
from collections import Counter

import torch
import torch._dynamo

from dmtjepa.masking import sample_masks
from dmtjepa.objective import build_model
from dmtjepa.training.parallel import compile_blocks


def test_at_most_two_graphs_per_kind_of_block_over_100_mask_shapes(settings):
    config = settings(**{"data.crop_size": 56, "data.batch_size": 2, "mask.context_cut": "rank"})
    torch._dynamo.reset()
    graphs = Counter()

    def kind_of(function):
        module = function.__self__
        width = next(module.parameters()).shape[-1]
        return type(module).__name__, function.__name__, width, next(module.parameters()).requires_grad

    @functools.cache
    def counting_backend(kind):
        def count(graph, inputs):
            graphs[kind] += 1
            return graph.forward

        return count

    def compiler(function, **options):
        return torch.compile(function, backend=counting_backend(kind_of(function)), **options)

    torch.manual_seed(0)
    model = build_model(config)
    compile_blocks(model, compiler)
    torch.manual_seed(0)
    eager = build_model(config)
    shapes = set()
    step = 0
    while len(shapes) < 100:
        masks = sample_masks(config.mask, config.grid_size, 2, seed=0, step=step, rank=0)
        step += 1
        shape = (masks.context_index.shape[1], masks.target_index.shape[2], len(masks.target_unique))
        if shape in shapes:
            continue
        shapes.add(shape)
        images = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
        loss = model(images, masks)
        loss.backward()
        if len(shapes) % 25 == 1:
            torch.testing.assert_close(loss, eager(images, masks), rtol=0, atol=0)
    kinds = {(name, trained) for name, _, _, trained in graphs}
    assert kinds == {("Block", True), ("Block", False), ("AggregationHead", True), ("AggregationHead", False)}
    assert len(graphs) == 5  # encoder and predictor blocks are two kinds
    assert max(graphs.values()) <= 2, graphs
