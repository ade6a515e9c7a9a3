"""Settings may stand anywhere on a command line; the last one given wins."""

import argparse

import pytest

from dmtjepa.arguments import parse_with_overrides
from dmtjepa.cli import submit, train


@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        ("data.batch_size=8 --devices cpu cpu data.batch_size=4", ["data.batch_size=8", "data.batch_size=4"]),
        ("--devices cpu a.b=1 --dry-run a.b=2", ["a.b=1", "a.b=2"]),
        ("a.b=2 --devices cpu a.b=1 --fname x.yaml a.b=2", ["a.b=1", "a.b=2", "a.b=2"]),
        ("--devices a.b=1", ["a.b=1"]),
    ],
)
def test_the_last_setting_wins_in_main(line, overrides):
    options = train.parse_arguments(["--fname", "x.yaml", *line.split()])
    assert options.overrides == overrides
    assert "=" not in "".join(options.devices or [])


def test_settings_can_follow_devices():
    options = train.parse_arguments(["--fname", "x.yaml", "--devices", "cpu", "cpu", "data.batch_size=8"])
    assert options.devices == ["cpu", "cpu"]
    assert options.overrides == ["data.batch_size=8"]


def test_the_last_setting_wins_in_main_distributed():
    line = "data.batch_size=8 --fname x.yaml y.yaml data.batch_size=4 --folder logs --constraint a=b data.batch_size=2"
    options = submit.parse_arguments(line.split())
    assert options.overrides == ["data.batch_size=8", "data.batch_size=4", "data.batch_size=2"]
    assert options.fname == ["x.yaml", "y.yaml"]
    assert options.constraint == "a=b"


def test_settings_files_must_be_named(capsys):
    with pytest.raises(SystemExit):
        submit.parse_arguments(["--fname", "data.batch_size=4", "--folder", "logs"])
    assert "names no settings file" in capsys.readouterr().err


def test_what_is_no_setting_is_refused(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", nargs="+")
    with pytest.raises(SystemExit):
        parse_with_overrides(parser, ["a.b=1", "nonsense"], list_option="devices")
    assert "unknown arguments: nonsense; any setting can follow as section.key=value" in capsys.readouterr().err
