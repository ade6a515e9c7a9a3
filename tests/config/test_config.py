"""Settings: the released schema is read unchanged, and every fault is named with its remedy."""

from pathlib import Path

import pytest
import yaml

from dmtjepa.config import Config, ConfigError, load_config, parse_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

# The released DMT-JEPA file for ViT-H/14, key by key.
RELEASED = """
data:
  batch_size: 128
  color_jitter_strength: 0.0
  crop_scale:
  - 0.3
  - 1.0
  crop_size: 224
  image_folder: imagenet1k
  num_workers: 10
  pin_mem: true
  root_path: ../../../data/
  use_color_distortion: false
  use_gaussian_blur: false
  use_horizontal_flip: false
logging:
  folder: ./vith14-224-ep300/
  write_tag: jepa
mask:
  allow_overlap: false
  aspect_ratio:
  - 0.75
  - 1.5
  enc_mask_scale:
  - 0.85
  - 1.0
  min_keep: 10
  num_enc_masks: 1
  num_pred_masks: 4
  patch_size: 14
  pred_mask_scale:
  - 0.15
  - 0.2
patch:
  local_agg_head: true
  patch_k_num: 4
  patch_k_size: 3
  context_attn: 'cross-attn'
  target_attn: 'cross-attn'
meta:
  copy_data: false
  load_checkpoint: true
  model_name: vit_huge
  pred_depth: 12
  pred_emb_dim: 384
  read_checkpoint: null
  use_bfloat16: true
optimization:
  ema:
  - 0.996
  - 1.0
  epochs: 300
  final_lr: 1.0e-06
  final_weight_decay: 0.4
  ipe_scale: 1.0
  lr: 0.001
  start_lr: 0.0002
  warmup: 40
  weight_decay: 0.04
"""


@pytest.fixture
def released(tmp_path):
    path = tmp_path / "released.yaml"
    path.write_text(RELEASED)
    return path


def test_released_file_is_read_unchanged(released):
    config = load_config(released)
    for section, values in yaml.safe_load(RELEASED).items():
        read = getattr(config, section).model_dump(mode="json")
        assert {key: read[key] for key in values} == values
    assert config.grid_size == (16, 16)


def test_without_patch_section_it_is_ijepa(released):
    values = yaml.safe_load(RELEASED)
    del values["patch"]
    assert not parse_config(values).patch.local_agg_head


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_own_configs(path):
    config = load_config(path)
    assert not config.meta.load_checkpoint
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_there_is_a_config_for_every_published_run():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "in1k_vitb16_ep600",
        "in1k_vitl16_ep600",
        "in1k_vith14_ep300",
        "in1k_vith16-448_ep300",
        "in22k_vitg16_ep44",
        "cifar10_vits4",
        "cifar10_cpu",
        "quickstart",
    }


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_compile_is_written_plainly_in_yaml(value):
    config = parse_config(yaml.safe_load(f"runtime: {{compile: {value}}}"))
    assert config.runtime.compile == value
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_overrides(released):
    config = load_config(released, ["data.batch_size=7", "optimization.lr=1e-4", "data.crop_scale=[0.5, 1]"])
    assert config.data.batch_size == 7
    assert config.optimization.lr == 1e-4
    assert config.data.crop_scale == (0.5, 1.0)
    rectangle = load_config(released, ["data.crop_size=[126, 196]"])
    assert rectangle.grid_size == (9, 14)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batchsize=3", ["data.batchsize", "did you mean batch_size?"]),
        ("dta.batch_size=3", ["dta", "did you mean data?"]),
        ("mask.patch_k_num=2", ["mask.patch_k_num", "did you mean patch.patch_k_num?"]),
        ("data.batch_size=0", ["data.batch_size", "greater than or equal to 1", "it is 0"]),
        ("data.batch_size=many", ["data.batch_size", "integer", "many"]),
        ("data.crop_scale=[0.5, 1.5]", ["data.crop_scale.1", "less than or equal to 1", "1.5"]),
        ("data.crop_scale=[0.9, 0.5]", ["data.crop_scale", "0.9", "0.5"]),
        ("data.crop_size=10", ["data.crop_size", "smaller than a patch", "14"]),
        ("data.crop_size=225", ["data.crop_size", "not a multiple", "224 and 238"]),
        ("mask.aspect_ratio=[2, 1]", ["mask.aspect_ratio", "larger than the second"]),
        ("mask.num_enc_masks=2", ["mask.num_enc_masks", "must be 1"]),
        ("patch.patch_k_size=4", ["patch.patch_k_size", "3, 5 or 7"]),
        ("patch.target_attn=self-attn", ["patch.target_attn", "cross-attn"]),
        ("meta.model_name=vit_bas", ["meta.model_name", "vit_base", "vit_bas"]),
        ("optimization.warmup=301", ["optimization.warmup", "300 epochs", "shorten"]),
        ("runtime.attention=flash", ["runtime.attention", "xformers", "flash"]),
        ("data.dataset=shapes", ["data.root_path", "no effect with data.dataset: shapes", "set data.dataset: folder"]),
        ("meta={read_checkpoint: x.pth.tar}", ["meta.read_checkpoint", "without meta.load_checkpoint"]),
        ("data={batch_size: 1, batch_size: 2}", ["not a YAML value"]),
        ("data.batch_size", ["section.key=value"]),
        ("=3", ["section.key=value"]),
        ("data.batch_size.x=3", ["batch_size is a value, not a section"]),
    ],
)
def test_faults_are_named_with_their_remedy(released, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(released, [override])
    for word in words:
        assert word in str(error.value)


def test_all_faults_are_listed_at_once(released):
    with pytest.raises(ConfigError) as error:
        load_config(released, ["data.batch_size=0", "mask.min_kep=3"])
    assert "data.batch_size" in str(error.value)
    assert "did you mean min_keep?" in str(error.value)


def test_neighbours_must_fit_the_window(released):
    with pytest.raises(ConfigError, match=r"window of 7 is larger than the grid of 4x4"):
        load_config(released, ["data.crop_size=56", "patch.patch_k_size=7"])


def test_missing_file_suggests_a_neighbour(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"quickstrat.yaml: No such file.*did you mean .*quickstart.yaml"):
        load_config(tmp_path / "quickstrat.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimization: {epochs: 1}\ndata: {batch_size: 8}\noptimization: {lr: 1}\n", "optimization .* lines 1 and 3"),
        ("optimization:\n  epochs: 1\n  lr: 1\n  'epochs': 300\n", "epochs .* lines 2 and 4"),
    ],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"x\\.yaml is not valid YAML: {words}"):
        load_config(path)


def test_a_merged_key_may_be_replaced(tmp_path):
    """`<<` takes over the keys of another mapping, of which some can be given anew."""
    path = tmp_path / "x.yaml"
    path.write_text("data: &data {batch_size: 8, num_workers: 1}\nevaluation: {<<: {batch_size: 3}, batch_size: 4}\n")
    assert load_config(path).evaluation.batch_size == 4


@pytest.mark.parametrize("text", ["data: [", "- a\n- b", "3"])
def test_a_file_that_is_no_settings_file(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        load_config(path)


def test_every_setting_says_what_it_is():
    for name, section in Config.model_fields.items():
        model = section.annotation
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key}"
