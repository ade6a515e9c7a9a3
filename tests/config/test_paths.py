"""`~` and environment variables mean the same in every path that a user gives."""

from pathlib import Path

import pytest

from dmtjepa.config import ConfigError, expand_path, parse_config
from dmtjepa.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("$SCRATCH/x", "/scratch/x"),
        ("${SCRATCH}x", "/scratchx"),
        ("a/~/$", "a/~/$"),
        ("./~x", "./~x"),
        ("", ""),
    ],
)
def test_all_paths_are_expanded_alike(text, path):
    assert expand_path(text, "logging.folder") == path
    config = parse_config({"data": {"root_path": text, "image_folder": "images"}, "logging": {"folder": text}})
    assert config.data.path == Path(path) / "images"
    assert RunFolder.from_config(config).path == Path(path)
    config = parse_config({"data": {"root_path": "/root", "image_folder": text}})
    assert config.data.path == Path("/root") / path


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(ConfigError, match=r"logging\.folder: \$NOT_SET/x contains \$NOT_SET, .* is not set; set") as e:
        expand_path("$NOT_SET/x", "logging.folder")
    assert str(e.value).endswith("set it, or name the path itself (logging.folder=PATH)")
    with pytest.raises(ConfigError, match=r"name the path itself$"):
        expand_path("$NOT_SET/x", "--fname")
    config = parse_config({"data": {"root_path": "$SCRATCH/${NOT_SET}"}, "logging": {"folder": "${NOT_SET}"}})
    with pytest.raises(ConfigError, match=r"data\.root_path: .*NOT_SET is not set"):
        _ = config.data.path
    with pytest.raises(ConfigError, match=r"logging\.folder: .*NOT_SET is not set"):
        RunFolder.from_config(config)


def test_an_unknown_user_is_named():
    with pytest.raises(ConfigError, match=r"--fname: ~nobody-of-this-name/x begins with ~nobody-of-this-name"):
        expand_path("~nobody-of-this-name/x", "--fname")
