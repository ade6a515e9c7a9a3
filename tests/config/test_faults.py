"""Every fault in the settings is named with its remedy."""

import fnmatch

import pytest

from dmtjepa.config import ConfigError, change_settings, load_config, parse_config


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
        ("data.crop_size=[48]", ["data.crop_size: must be integer or [first, second], each an integer (it is [48])"]),
        ("data.crop_size=[8, a]", ["data.crop_size: must be integer or [first, second], each an integer"]),
        ("optimization.ema=0.99", ["optimization.ema: must be [first, second], each a number", "(it is 0.99)"]),
        ("mask.pred_mask_scale=[0.1, 0.2, 0.3]", ["mask.pred_mask_scale: must be [first, second]", "0.3]"]),
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
def test_faults_are_named_with_their_remedy(official, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(official, [override])
    for word in words:
        assert word in str(error.value)


def test_a_value_of_another_shape_is_one_fault(official):
    with pytest.raises(ConfigError) as error:
        load_config(official, ["data.crop_size=[48]"])
    assert str(error.value).count("data.crop_size") == 1


def test_all_faults_are_listed_at_once(official):
    with pytest.raises(ConfigError) as error:
        load_config(official, ["data.batch_size=0", "mask.min_kep=3"])
    assert "data.batch_size" in str(error.value)
    assert "did you mean min_keep?" in str(error.value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("", ["data.batch_size=abc"], "typed:\n  data.batch_size: must be a valid integer, *"),
        ("", ["data.crop_scale=[0.5, 7]"], "typed:\n  data.crop_scale.1: *"),
        ("", ["data.batchsize=4"], "typed:\n  data.batchsize: unknown key; *"),
        ("", ["dta.batch_size=4"], "typed:\n  dta: unknown key; *"),
        ("", ["meta={read_checkpoint: a}"], "typed:\n  meta.read_checkpoint: *"),
        ("", ["mask.aspect_ratio=[2, 1]"], "typed:\n  mask.aspect_ratio: *"),
        ("", ["data.crop_size=9"], "typed:\n  data.crop_size: height 9 is smaller than a patch *"),
        ("data: {batch_size: 0}", ["data.num_workers=1"], "FILE:\n  data.batch_size: *"),
        ("data: {batchsize: 4}", ["data.batch_size=4"], "FILE:\n  data.batchsize: unknown key; *"),
        ("dta: {}", [], "FILE:\n  dta: unknown key; *"),
        ("optimization: {warmup: 500}", ["data.batch_size=4"], "FILE:\n  optimization.warmup: *"),
        ("optimization: {warmup: 9}", ["optimization.epochs=5"], "FILE together with typed:\n  optimization.warmup: *"),
        ("optimization: {warmup: 9}", ["optimization={epochs: 5}"], "typed:\n  optimization.warmup: *"),
        ("data: {batch_size: 0}", ["data.batch_size=-1"], "typed:\n  data.batch_size: * (it is -1)"),
        ("mask: {x: 1}", ["mask.y=1", "data.z=1"], "typed:\n  data.z: *\n  mask.y: *\nFILE:\n  mask.x: *"),
    ],
)
def test_what_has_a_fault_is_named(tmp_path, text, overrides, message):
    """The file, the command line, or both."""
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, overrides_from="typed")
    assert fnmatch.fnmatchcase(str(error.value).replace(str(path), "FILE"), message.replace("[", "[[]"))


def test_overrides_in_python_are_named():
    with pytest.raises(ConfigError, match=r"^the overrides:\n  data\.batch_size: "):
        change_settings(parse_config({}), {"data.batch_size": 0})
    with pytest.raises(ConfigError, match=r"^the settings together with the overrides:\n  optimization\.warmup: "):
        change_settings(parse_config({}), {"optimization.epochs": 1})


def test_neighbours_must_fit_the_window(official):
    with pytest.raises(ConfigError, match=r"window of 7 is larger than the grid of 4x4"):
        load_config(official, ["data.crop_size=56", "patch.patch_k_size=7"])
