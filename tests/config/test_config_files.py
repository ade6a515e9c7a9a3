"""The settings files of this project, in configs/."""

from pathlib import Path

import pytest
import yaml

from dmtjepa.config import load_config, parse_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_own_configs(path):
    config = load_config(path)
    assert not config.meta.load_checkpoint
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_there_is_a_config_for_every_official_run():
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
        "small_images",
    }
