"""The schema: official files are read unchanged, and each setting is described."""

import yaml

from dmtjepa.config import Config, load_config, parse_config


def test_an_official_file_is_read_unchanged(official):
    config = load_config(official)
    for section, values in yaml.safe_load(official.read_text()).items():
        read = getattr(config, section).model_dump(mode="json")
        assert {key: read[key] for key in values} == values
    assert config.grid_size == (16, 16)


def test_without_patch_section_it_is_ijepa(official):
    values = yaml.safe_load(official.read_text())
    del values["patch"]
    assert not parse_config(values).patch.local_agg_head


def test_every_setting_has_a_description():
    for name, section in Config.model_fields.items():
        model = section.annotation
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key}"
