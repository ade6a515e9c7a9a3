"""Compilation, sharding and their order."""

import functools
import json
from collections import Counter

import pytest
import torch
import torch._dynamo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import dmtjepa.training.parallelize
from dmtjepa.config import MaskSettings
from dmtjepa.masks import MaskSampler
from dmtjepa.models import AggregationHead, Predictor, VisionTransformer
from dmtjepa.models.onednn import compute_by_onednn
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.training.compute_plan import ComputePlan
from dmtjepa.training.distributed import process_group
from dmtjepa.training.optimizer import build_optimizer
from dmtjepa.training.parallelize import (
    CASTING_VERSIONS,
    build_mesh,
    checkpoint_blocks,
    compile_blocks,
    group_fsdp_units,
    parallelize,
    set_memory_budget,
)
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize("autotune", [False, True])
def test_the_products_of_the_teacher_alone_are_tuned_and_only_on_request(settings, autotune):
    config = settings(**{"runtime.autotune_teacher": autotune})
    plan, model = ComputePlan.from_config(config, "cuda"), build_model(config)
    tuned = []

    def compiler(function, **options):
        if options.get("mode") == "max-autotune-no-cudagraphs":
            tuned.append(function.__self__)
        return function

    compile_blocks(model, compiler, autotune_teacher=plan.autotune_teacher)
    assert tuned == (list(model.teacher_encoder.blocks) if autotune else [])


@pytest.mark.usefixtures("_alone")
def test_a_run_says_that_nothing_is_tuned_where_blocks_are_not_compiled(settings, caplog):
    config = settings(**{"runtime.autotune_teacher": True})  # runtime.compile is off by itself on a CPU
    with caplog.at_level("INFO"):
        parallelize(build_model(config), build_mesh("cpu", 1), ComputePlan.from_config(config, "cpu"))
    assert "runtime.autotune_teacher has no effect" in caplog.text


@pytest.mark.slow
def test_at_most_two_graphs_per_kind_of_block_over_100_mask_shapes(settings):
    config = settings(**{"data.crop_size": 56, "data.batch_size": 2, "mask.context_cut": "rank"})
    torch._dynamo.reset()
    graphs = Counter()

    def kind_of(function):
        module = function.__self__
        width = next(module.parameters()).shape[-1]
        name = "last Block" if module is model.predictor.predictor_blocks[-1] else type(module).__name__
        return name, function.__name__, width, next(module.parameters()).requires_grad

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
        masks = MaskSampler.from_config(config, seed=0).sample(step)
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
    heads = {("AggregationHead", True), ("AggregationHead", False)}
    assert kinds == {("Block", True), ("Block", False), ("last Block", True)} | heads
    assert len(graphs) == 5 + (config.meta.pred_depth > 1)  # encoder and predictor blocks are two kinds
    assert max(graphs.values()) <= 2, graphs


def report_bytes(folder, shard_size):
    """Write down the bytes of weights, gradients and Adam's averages, student and teacher, that a rank holds."""
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=3600) as world:
        torch.manual_seed(0)
        encoder = VisionTransformer(32, 8, embed_dim=192, depth=2, num_heads=3)
        predictor = Predictor((4, 4), embed_dim=192, predictor_dim=96, depth=1, num_heads=3)
        head = AggregationHead(192, 3)
        mesh = build_mesh("cpu", world.world_size, shard_size)
        model = parallelize(DMTJEPA(encoder, predictor, head), mesh, ComputePlan())
        optimizer = build_optimizer([model.encoder, model.predictor, model.head])
        masks = MaskSampler(MaskSettings(patch_size=8, min_keep=0), (4, 4), 1).sample(0, world.rank, world.world_size)
        images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
        model.loss(model.predict_targets(images, masks), model.compute_targets(images, masks), masks).backward()
        optimizer.step()
        parameters = list(model.parameters())
        assert all(parameter.grad is not None for parameter in parameters if parameter.requires_grad)
        held = parameters + [parameter.grad for parameter in parameters if parameter.requires_grad]
        held += [row[name] for row in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        nbytes = sum(tensor.to_local().numel() * tensor.element_size() for tensor in held)
        (folder / f"{world.world_size}-{world.rank}.json").write_text(json.dumps(nbytes))


@pytest.mark.slow
def test_memory_of_a_rank_falls_as_one_over_the_number_of_ranks(tmp_path):
    def measure(count, shard_size=None):
        ends = run_ranks(report_bytes, count, tmp_path, tmp_path, shard_size)
        assert [code for code, _ in ends] == [0] * count, ends
        return [json.loads((tmp_path / f"{count}-{rank}.json").read_text()) for rank in range(count)]

    (whole,) = measure(1)
    model = DMTJEPA(
        VisionTransformer(32, 8, embed_dim=192, depth=2, num_heads=3),
        Predictor((4, 4), embed_dim=192, predictor_dim=96, depth=1, num_heads=3),
        AggregationHead(192, 3),
    )
    student = sum(p.numel() for p in model.parameters() if p.requires_grad)
    teacher = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert whole == 16 * student + 4 * teacher  # as `dmtjepa.training.estimate` counts
    for count in (2, 4):
        shares = measure(count)
        assert sum(shares) == whole
        assert max(shares) == pytest.approx(whole / count, rel=0.02)
    # HSDP: two copies of two shards each.
    assert max(measure(4, shard_size=2)) == pytest.approx(whole / 2, rel=0.02)


def train_casting(folder, at_once, reshard, recompute):
    """Write down the gradients of two steps, each of two backward passes, and how many casts and copies they made."""
    if not at_once:
        dmtjepa.training.parallelize.cast_at_once = lambda model, **options: None
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=3600):
        torch.manual_seed(0)
        encoder = VisionTransformer(32, 8, embed_dim=192, depth=2, num_heads=3)
        predictor = Predictor((4, 4), embed_dim=192, predictor_dim=96, depth=1, num_heads=3)
        model = DMTJEPA(encoder, predictor, AggregationHead(192, 3))
        plan = ComputePlan(torch.bfloat16, recompute=recompute, reshard_after_forward=reshard)
        parallelize(model, build_mesh("cpu", 1), plan)
        optimizer = build_optimizer([model.encoder, model.predictor, model.head])
        found = []
        with _Called() as called:
            for step in range(4):
                images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
                masks = MaskSampler(MaskSettings(patch_size=8, min_keep=0), (4, 4), 2).sample(step)
                loss = model.loss(model.predict_targets(images, masks), model.compute_targets(images, masks), masks)
                loss.backward()
                if step % 2:
                    found += [loss.detach(), *(p.grad.to_local().clone() for p in encoder.parameters())]
                    optimizer.step()
                    optimizer.zero_grad()
                    model.update_teacher(0.9)
        copies = called.counts[torch.ops.aten._to_copy.default] + called.counts[torch.ops.aten.copy_.default]
        torch.save((found, copies), folder / f"{at_once}.pt")


class _Called(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith(CASTING_VERSIONS), reason="another PyTorch keeps its own way")
@pytest.mark.parametrize(("reshard", "recompute"), [(True, "none"), (False, "none"), (True, "blocks")])
def test_weights_that_are_cast_at_once_are_those_that_are_cast_one_by_one(tmp_path, reshard, recompute):
    results = []
    for at_once in (True, False):
        ends = run_ranks(train_casting, 1, tmp_path, tmp_path, at_once, reshard, recompute)
        assert [code for code, _ in ends] == [0], ends
        results.append(torch.load(tmp_path / f"{at_once}.pt"))
    (at_once, few), (one_by_one, many) = results
    assert few < many / 2
    for actual, expected in zip(at_once, one_by_one, strict=True):
        assert torch.equal(actual, expected)


def test_a_version_whose_casts_are_not_replaced_is_named(monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", "2.12.0")
    with caplog.at_level("INFO"):
        dmtjepa.training.parallelize.cast_at_once(torch.nn.Linear(1, 1))
    assert "torch 2.12.0: FSDP2 casts each parameter by itself" in caplog.text


@pytest.mark.slow
def test_units_of_blocks():
    blocks = [torch.nn.Linear(1000, 10_000, bias=False) for _ in range(7)]  # 10 million parameters each

    class Mesh:
        def __init__(self, device_type, shards):
            self.device_type, self.size = device_type, lambda: shards

        def __getitem__(self, name):
            assert name == "shard"
            return self

    def sizes(device_type, shards):
        units = group_fsdp_units(blocks, Mesh(device_type, shards))
        assert [block for unit in units for block in unit] == (blocks if units else [])
        return [len(unit) for unit in units]

    assert sizes("cuda", 8) == [4, 3]
    assert sizes("cuda", 1) == []
    assert sizes("cpu", 1) == sizes("cpu", 2) == [1] * 7


def test_shards_must_divide_the_processes():
    with pytest.raises(ValueError, match=r"shard_size: 6 processes cannot be divided into groups of 4"):
        build_mesh("cpu", 6, 4)


@pytest.mark.parametrize("residual", ["bfloat16", "float32"])
def test_dtype_of_the_residual_stream(settings, residual):
    """Of student and teacher, also where FSDP2 casts the inputs of the modules that it shards."""
    config = settings(**{"runtime.precision": "bfloat16", "runtime.residual": residual})
    seen = set()
    with process_group(torch.device("cpu"), start_timeout=600, hang_timeout=3600) as world:
        model = build_model(config)
        parallelize(model, build_mesh("cpu", world.world_size), ComputePlan.from_config(config, "cpu"))
        for block in (*model.encoder.blocks, *model.teacher_encoder.blocks, *model.predictor.predictor_blocks):
            block.norm2.register_forward_pre_hook(lambda _, inputs: seen.add(("residual", inputs[0].dtype)))
            block.mlp.register_forward_pre_hook(lambda _, inputs: seen.add(("mlp", inputs[0].dtype)))
        masks = MaskSampler.from_config(config, batch_size=2).sample(0)
        images = torch.zeros(2, 3, *config.data.image_size, dtype=torch.uint8)
        model.loss(model.predict_targets(images, masks), model.compute_targets(images, masks), masks).backward()
    assert seen == {("mlp", torch.bfloat16), ("residual", getattr(torch, residual))}


class _Created(TorchDispatchMode):
    """Remembers, without keeping them alive, all memory that operators allocate."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.storages[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return output

    def num_bytes(self, without):
        """Bytes that are still held, but for those of the parameters of `without`, whose views count as created."""
        known = {StorageWeakRef(p.untyped_storage()) for p in without.parameters()}
        return sum(size for storage, size in self.storages.items() if not storage.expired() and storage not in known)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize(("recompute", "least", "most"), [("none", 15, 17), ("pointwise", 9, 13), ("blocks", 0, 2)])
def test_what_is_kept_for_the_backward_pass_of_a_block(recompute, least, most, onednn):
    """In numbers per patch and channel: what a forward pass leaves behind, its output included."""
    torch.manual_seed(0)
    encoder = VisionTransformer(64, 8, embed_dim=64, depth=1, num_heads=2)
    if onednn:
        compute_by_onednn(encoder)
    block, x = encoder.blocks[0], torch.randn(4, 64, 64, requires_grad=True)
    block(x).sum().backward()
    expected = x.grad.clone()
    model = DMTJEPA(encoder, Predictor((8, 8), embed_dim=64, predictor_dim=32, depth=1, num_heads=2), None)
    checkpoint_blocks([*model.encoder.blocks], recompute)
    x.grad = None
    with _Created() as created:
        y = block(x)
        kept = created.num_bytes(without=block) / (4 * x.numel())
    assert least <= kept <= most
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.fixture
def default_memory_budget():
    """Puts the memory budget of compiled graphs back after a test."""
    yield
    set_memory_budget("none")


@pytest.mark.slow
@pytest.mark.usefixtures("default_memory_budget")
def test_compiled_blocks_keep_less_where_pointwise_operators_are_recomputed(settings):
    config = settings()
    kept = {}
    for recompute in ("none", "pointwise"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = build_model(config)
        set_memory_budget(recompute)
        # The partition decides what is kept; Inductor's C++ would take a minute to compile.
        compile_blocks(model, compiler=functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(8, 36, model.encoder.embed_dim, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.encoder.blocks[0](x).sum().backward()
        weights = sum(4 * p.numel() for p in model.encoder.blocks[0].parameters())
        kept[recompute] = (sum(storages.values()) - weights) / (4 * x.numel())
    assert kept["pointwise"] < 0.75 * kept["none"]
