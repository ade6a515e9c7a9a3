"""Settings are read from YAML and from overrides, and what is neither is refused."""

import pytest
import yaml

from dmtjepa.config import ConfigError, load_config, parse_config


def test_overrides(official):
    config = load_config(official, ["data.batch_size=7", "optimization.lr=1e-4", "data.crop_scale=[0.5, 1]"])
    assert config.data.batch_size == 7
    assert config.optimization.lr == 1e-4
    assert config.data.crop_scale == (0.5, 1.0)
    rectangle = load_config(official, ["data.crop_size=[126, 196]"])
    assert rectangle.grid_size == (9, 14)


def test_images_on_the_command_line_take_the_place_of_drawn_ones(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("data: {dataset: shapes}\n")
    assert load_config(path, ["data.root_path=photos"]).data.dataset == "folder"
    assert load_config(path, ["data.root_path=''"]).data.dataset == "shapes"
    with pytest.raises(ConfigError, match=r"no effect with data\.dataset: shapes"):
        load_config(path, ["data.root_path=photos", "data.dataset=shapes"])


def test_a_folder_may_be_left_empty_as_a_shell_and_yaml_write_it(official, tmp_path):
    for override in ("data.image_folder=", "data.image_folder=''", "data.image_folder=null"):
        assert load_config(official, [override]).data.image_folder == ""
    path = tmp_path / "x.yaml"
    path.write_text("data:\n  root_path: /photos\n  image_folder:\n")
    assert str(load_config(path).data.path) == "/photos"


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_compile_is_written_plainly_in_yaml(value):
    config = parse_config(yaml.safe_load(f"runtime: {{compile: {value}}}"))
    assert config.runtime.compile == value
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


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
