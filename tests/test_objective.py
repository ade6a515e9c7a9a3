"""Forward, loss, every gradient and whole training steps against `dmtjepa.reference.step`."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dmtjepa.config import ConfigError, load_config, parse_config
from dmtjepa.models import VisionTransformer
from dmtjepa.objective import DMTJEPA, build_model
from dmtjepa.reference import step as reference
from tests.helpers.models import PATCH, Case, make_images, make_masks, make_model, relative_error, student_gradients

CASES = [
    Case(1, (6, 6), 4, 3, "wrap"),
    Case(3, (6, 6), 4, 3, "clip"),
    Case(2, (6, 6), 1, 5, "clip", embed_dim=48, num_heads=2),
    Case(3, (9, 14), 4, 3, "wrap"),
    Case(2, (9, 14), 8, 7, "clip"),
    Case(2, (14, 14), 4, 3, "wrap", embed_dim=24, num_heads=3),
    Case(1, (14, 14), 6, 5, "wrap"),
    Case(2, (16, 16), 4, 3, "clip"),
    Case(3, (16, 16), 8, 3, "wrap"),
    Case(2, (16, 16), 2, 7, "wrap"),
    Case(2, (9, 14), 4, 3, "wrap", head=False),
    Case(3, (9, 14), 4, 3, "wrap", query="targets"),
    Case(2, (6, 6), 3, 5, "clip", query="targets"),
    Case(3, (9, 14), 4, 3, "wrap", query="patch"),
    Case(2, (6, 6), 3, 5, "clip", query="patch"),
    Case(2, (6, 6), 4, 3, "wrap", channels=5),
    Case(3, (6, 6), 4, 3, "wrap", head=False, context_loss=0.5),
    Case(3, (9, 14), 4, 5, "clip", context_loss=0.5),
    Case(2, (6, 6), 4, 3, "clip", query="targets", context_loss=2.0),
    Case(2, (6, 6), 4, 3, "clip", query="patch", context_loss=1.0),
]


# Largest relative errors of outputs and of gradients.
TOLERANCES = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-4)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_equals_reference(case, dtype):
    model = make_model(case, dtype)
    masks, images = make_masks(case), make_images(case, dtype)
    expected_targets = reference.compute_targets(model, images, masks.target_index)
    expected_predictions = reference.predict_targets(model, images, masks.context_index, masks.target_index)
    expected_loss = reference.compute_loss(
        model, images, masks.context_index, masks.target_index, context_loss=case.context_loss
    )
    expected_loss.backward()
    expected = student_gradients(model)
    model.zero_grad()

    targets = model.compute_targets(images, masks)
    predictions = model.predict_targets(images, masks)
    loss = model.loss(predictions, targets, masks)
    loss.backward()

    for_outputs, for_gradients = TOLERANCES[dtype]
    num_seen = masks.context_index.numel() if case.context_loss else 0
    assert targets.shape == (len(masks.target_unique) + num_seen, case.embed_dim)
    assert relative_error(targets[masks.target_slot], expected_targets) < for_outputs
    assert relative_error(predictions.targets, expected_predictions) < for_outputs
    assert relative_error(loss, expected_loss) < for_outputs
    gradients = student_gradients(model)
    assert gradients.keys() == expected.keys()
    # Every parameter of the student is trained; none of the teacher's is.
    student = [m for m in (model.encoder, model.predictor, model.head) if m is not None]
    assert len(gradients) == sum(1 for module in student for _ in module.parameters())
    scale = max(gradient.norm() for gradient in expected.values())
    for name, gradient in gradients.items():
        if name.endswith("attn.k.bias"):
            # A bias of all keys alike cancels in the softmax: both gradients are rounding errors around zero.
            assert max(gradient.norm(), expected[name].norm()) < 1e-5 * scale
        else:
            assert relative_error(gradient, expected[name]) < for_gradients, name


@pytest.mark.parametrize("query", ["image", "targets", "patch"])
def test_neighborhood_changes_nothing(query):
    case = Case(3, (9, 14), 4, 5, "clip", query=query)
    model, masks = make_model(case, torch.float64), make_masks(case)
    h = F.layer_norm(torch.randn(3, 126, case.embed_dim, dtype=torch.float64), (case.embed_dim,))
    with torch.no_grad():
        subset = model.head.aggregate_neighbors(h, case.grid, masks.target_unique, masks.neighborhood)
        whole = model.head.aggregate_neighbors(h, case.grid, masks.target_unique)
    torch.testing.assert_close(subset, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{"window": 3}, {"border": "wrap"}], ids=str)
def test_masks_for_another_window_are_refused(changes):
    """They have other neighbourhoods, and the head would take neighbours outside of them for missing ones."""
    case = Case(2, (9, 14), 4, 5, "clip")
    model, masks = make_model(case, torch.float32), make_masks(case._replace(**changes))
    with pytest.raises(ValueError, match=r"the masks were sampled for windows of .* build both from one configuration"):
        model(make_images(case, torch.float32), masks)


@pytest.mark.parametrize("query", ["image", "targets", "patch"])
@pytest.mark.parametrize("border", ["wrap", "clip"])
def test_an_image_changes_no_other_images_targets(border, query):
    """The official code pairs queries with other images' patches when B > 1."""
    case = Case(4, (6, 6), 4, 3, border, query=query)
    model, masks = make_model(case, torch.float32), make_masks(case)
    images = make_images(case, torch.float32)
    before = model.compute_targets(images, masks)
    for changed in range(case.batch):
        others = images.clone()
        others[changed] = torch.randn_like(others[changed])
        after = model.compute_targets(others, masks)
        is_changed = masks.target_unique // 36 == changed
        assert torch.equal(before[~is_changed], after[~is_changed])
        assert not torch.allclose(before[is_changed], after[is_changed])


def test_patches_outside_the_context_never_reach_the_student():
    case = Case(2, (6, 6), 4, 3, "wrap")
    model, masks = make_model(case, torch.float32), make_masks(case)
    images = make_images(case, torch.float32)
    outside = torch.ones(2, 36, dtype=torch.bool).scatter(1, masks.context_index, False)
    hidden = outside.view(2, 1, 6, 6).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    changed = torch.where(hidden, torch.full_like(images, float("nan")), images)
    assert torch.equal(model.predict_targets(images, masks).targets, model.predict_targets(changed, masks).targets)


@pytest.mark.slow
def test_eight_training_steps_follow_the_reference():
    case = Case(4, (6, 6), 4, 3, "wrap")
    model = make_model(case, torch.float32)
    steps = range(8)
    masks = [make_masks(case, step) for step in steps]
    images = [make_images(case, torch.float32) for _ in steps]
    learning_rates, decays = [1e-3 + 1e-4 * s for s in steps], [0.04 + 0.01 * s for s in steps]
    momenta = [0.9 + 0.01 * s for s in steps]
    batches = [(x, m.context_index, m.target_index) for x, m in zip(images, masks, strict=True)]
    trained, expected = reference.train(model, batches, learning_rates, decays, momenta)

    student = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in student if p.ndim > 1]}, {"params": [p for p in student if p.ndim == 1]}]
    )
    losses = []
    for step in steps:
        for group, decay in zip(optimizer.param_groups, (decays[step], 0.0), strict=True):
            group["lr"], group["weight_decay"] = learning_rates[step], decay
        loss = model(images[step], masks[step])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(momenta[step])
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    for (name, actual), wanted in zip(model.named_parameters(), trained.parameters(), strict=True):
        if not name.endswith("attn.k.bias"):  # Adam scales its rounding errors up to full steps
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4, msg=name)
    # The teacher has moved, and is not the student.
    assert not torch.equal(model.teacher_head.norm.weight, model.head.norm.weight)


def test_uint8_images_equal_normalised_ones():
    case = Case(2, (9, 14), 4, 3, "wrap")
    model, masks = make_model(case, torch.float64), make_masks(case)
    images = torch.randint(0, 256, (2, 3, 36, 56), dtype=torch.uint8)
    normalised = reference.normalize_pixels(images, torch.float64)
    torch.testing.assert_close(model(images, masks), model(normalised, masks), rtol=1e-6, atol=1e-7)


def test_others_cannot_have_the_neighborhood_of_the_targets():
    case = Case(2, (6, 6), 4, 3, "wrap")
    model, masks = make_model(case, torch.float32), make_masks(case)
    h = torch.randn(2, 36, case.embed_dim)
    with pytest.raises(ValueError, match="others needs neighborhood=None"):
        model.head.aggregate_neighbors(h, case.grid, masks.target_unique, masks.neighborhood, masks.flat_context(36))


@pytest.mark.parametrize("context_loss", [0.0, 0.5])
def test_l2_loss(context_loss):
    case = Case(2, (6, 6), 4, 3, "wrap", context_loss=context_loss)
    model, masks = make_model(case, torch.float64), make_masks(case)
    model.loss_name = "l2"
    images = make_images(case, torch.float64)
    indices = masks.context_index, masks.target_index
    expected = reference.compute_loss(model, images, *indices, loss="l2", context_loss=context_loss)
    torch.testing.assert_close(model(images, masks), expected, rtol=1e-9, atol=0)


def test_teacher_starts_as_the_student_and_follows_it():
    case = Case(1, (6, 6), 4, 3, "wrap")
    model = make_model(case, torch.float32)
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.encoder.norm.weight.add_(1.0)
        model.head.norm.bias.sub_(2.0)
    model.update_teacher(0.75)
    torch.testing.assert_close(
        model.teacher_encoder.norm.weight,
        0.75 * before.teacher_encoder.norm.weight + 0.25 * model.encoder.norm.weight,
    )
    torch.testing.assert_close(
        model.teacher_head.norm.bias, 0.75 * before.teacher_head.norm.bias + 0.25 * model.head.norm.bias
    )
    model.update_teacher(1.0)
    assert not any(p.requires_grad for p in model.teacher_encoder.parameters())


def test_build_model_is_drawn_from_the_seed():
    config = parse_config(
        {
            "data": {"crop_size": 32},
            "mask": {"patch_size": 8, "min_keep": 0},
            "meta": {"model_name": "vit_tiny", "pred_emb_dim": 48, "pred_depth": 1},
            "patch": {"patch_k_num": 3, "border": "clip"},
        }
    )
    torch.manual_seed(5)
    one = build_model(config)
    torch.manual_seed(5)
    two = build_model(config)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (one.head.num_neighbors, one.head.border, one.encoder.grid_size) == (3, "clip", (4, 4))
    for a, b in zip(one.teacher_encoder.parameters(), one.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ijepa_targets_are_the_teachers_own_features():
    case = Case(2, (6, 6), 4, 3, "wrap", head=False)
    model, masks = make_model(case, torch.float64), make_masks(case)
    images = make_images(case, torch.float64)
    h = model.teacher_encoder(images)
    h = F.layer_norm(h, h.shape[-1:]).flatten(0, 1)
    assert torch.equal(model.compute_targets(images, masks), h[masks.target_unique].detach())


@pytest.mark.parametrize(("query", "changed"), [("image", True), ("targets", False), ("patch", False)])
def test_a_patch_that_no_target_sees_changes_the_image_query_alone(query, changed):
    case = Case(1, (9, 14), 2, 3, "clip", query=query)
    model, masks = make_model(case, torch.float64), make_masks(case)
    h = F.layer_norm(torch.randn(1, 126, case.embed_dim, dtype=torch.float64), (case.embed_dim,))
    outside = [patch for patch in range(126) if patch not in masks.neighborhood.tolist()]
    other = h.clone()
    other[0, outside] = h[0, outside].flip(0)
    other[0, outside[0]] *= 2
    before, after = (model.teacher_head.aggregate_neighbors(x, case.grid, masks.target_unique) for x in (h, other))
    assert torch.allclose(before, after) != changed


@pytest.mark.slow
@pytest.mark.parametrize("query", ["targets", "patch"])
def test_each_query_compiles_without_graph_breaks(query):
    case = Case(2, (6, 6), 4, 3, "wrap", query=query)
    model = make_model(case, torch.float32)
    head = model.teacher_head
    expected = head.aggregate_neighbors
    compiled = torch.compile(expected, fullgraph=True, dynamic=True, backend="aot_eager")
    for step in range(3):
        masks = make_masks(case, step)
        h = F.layer_norm(torch.randn(2, 36, case.embed_dim), (case.embed_dim,))
        arguments = h, case.grid, masks.target_unique, masks.neighborhood
        torch.testing.assert_close(compiled(*arguments), expected(*arguments))


def test_unknown_loss_is_refused():
    case = Case(1, (6, 6), 4, 3, "wrap")
    model = make_model(case, torch.float32)
    with pytest.raises(ValueError, match="smooth_l1 or l2"):
        DMTJEPA(model.encoder, model.predictor, model.head, loss="l1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in1k_vitb16_ep600"])
def test_an_official_configuration_builds(name, request):
    config = load_config(request.config.rootpath / "configs" / f"{name}.yaml")
    with torch.device("meta"):
        encoder = VisionTransformer(224, 16)
    torch.manual_seed(0)
    model = build_model(config)
    assert {n: p.shape for n, p in model.encoder.named_parameters()} == {
        n: p.shape for n, p in encoder.named_parameters()
    }


@pytest.mark.parametrize(
    ("model_name", "width", "words"),
    [
        ("vit_nano", 30, "30 is not a multiple of 4; the predictor of vit_nano has 2 heads, .* are 28 and 32"),
        ("vit_base", 100, "100 is not a multiple of 12; the predictor of vit_base has 12 heads, .* are 96 and 108"),
        ("vit_large", 12, "12 is not a multiple of 16; .* are 16 and 32"),
    ],
)
def test_a_width_that_does_not_suit_the_predictor_names_its_setting(model_name, width, words):
    config = parse_config({"meta": {"model_name": model_name, "pred_emb_dim": width, "pred_depth": 1}})
    with pytest.raises(ConfigError, match=rf"meta\.pred_emb_dim: {words}"):
        build_model(config)
