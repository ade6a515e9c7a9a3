"""The command `dmtjepa`: its commands, what they import, settings by name, and what a wheel of it holds."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dmtjepa
from dmtjepa.cli import COMMANDS, main, train
from dmtjepa.config import ConfigError, find_settings, list_shipped, load_config
from tests.helpers.wheel import build_wheel

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "pydantic", "PIL", "yaml", "tqdm")


def test_help_imports_nothing_that_computes():
    program = f"""if True:
        import sys
        from dmtjepa.cli import COMMANDS, main
        for command in COMMANDS:
            try:
                main([command, "--help"])
            except SystemExit as end:
                assert end.code == 0
        loaded = {{name.split(".")[0] for name in sys.modules}} & set({HEAVY})
        assert not loaded, loaded
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"usage: dmtjepa {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_alike(command, capsys, monkeypatch):
    """80 columns, values in capitals, a text for each option, and a command to copy."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []
    usage, entries, examples = re.match(r"(.*?)\n\n(.*)\nexamples?:\n(.*)", text, re.DOTALL).groups()
    words = usage.removeprefix(f"usage: dmtjepa {command} ").replace("[-h]", "")
    values = re.findall(r"[^\s\[\]|.]+", words)
    assert [value for value in values if not value.startswith("--") and value != value.upper()] == []
    lines = entries.splitlines()
    options = [index for index, line in enumerate(lines) if re.match(r"  (-|[A-Z]+\b)", line)]
    assert len(options) >= 2  # --help, and what the command is about
    for index in options:
        assert re.match(r"  \S.*?  +\S", lines[index]) or re.match(r" {8}", lines[index + 1]), lines[index]
    assert all(line.startswith(("  dmtjepa " + command, "      ")) for line in examples.splitlines())


def test_commands_are_listed(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"dmtjepa {dmtjepa.__version__}\n"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(("module", "command"), [("check", "dmtjepa check"), ("make_shards", "dmtjepa shards")])
def test_commands_of_earlier_versions_do_not_end_silently_without_their_work(module, command):
    with pytest.raises(SystemExit, match=f"is now `{command} "):
        runpy.run_module(f"dmtjepa.data.{module}", run_name="__main__")


def test_shipped_settings_are_found_by_name(tmp_path, monkeypatch):
    assert set(list_shipped()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    monkeypatch.chdir(tmp_path)
    assert load_config(find_settings("quickstart")) == load_config(ROOT / "configs" / "quickstart.yaml")
    Path("quickstart").write_text("{data: {batch_size: 7}}")
    assert load_config(find_settings("quickstart")).data.batch_size == 7  # the user's own comes first


def test_unknown_settings_name_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean quickstart[?] It has"):
        find_settings("quikstart")
    assert find_settings("nowhere/quickstart") == Path("nowhere/quickstart")
    assert find_settings("quickstart.yaml") == Path("quickstart.yaml")


def test_training_takes_settings_without_an_option(tmp_path, capsys):
    command = ["quickstart", "--devices", "cpu", "--dry-run", f"logging.folder={tmp_path / 'run'}", "data.batch_size=0"]
    assert train.main(command, prog="dmtjepa train") == 1
    error = capsys.readouterr().err
    assert "ConfigError: the command line:\n  data.batch_size: " in error
    assert "quickstart.yaml" not in error


def test_settings_are_listed(capsys):
    assert main(["settings", "mask.pack"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mask.pack = false   (true or false)")
    assert lines[1].startswith("    ")
    assert main(["settings", "--shipped"]) == 0
    assert capsys.readouterr().out.split() == list_shipped()
    assert main(["settings", "--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "settings.md").read_text()


def test_schema_describes_every_setting(capsys):
    assert main(["settings", "--json-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for section, reference in schema["properties"].items():
        name = (reference.get("$ref") or reference["allOf"][0]["$ref"]).rpartition("/")[2]
        for key, setting in schema["$defs"][name]["properties"].items():
            assert setting["description"], f"{section}.{key}"


def test_unknown_setting_names_the_nearest(capsys):
    assert main(["settings", "data.batchsize"]) == 1
    assert "did you mean data.batch_size?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wheel_is_whole(tmp_path):
    """Built from an sdist: what neither has is missing. The package works without a checkout beside it."""
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "dmtjepa").rglob("*.py")}
    code |= {f"dmtjepa/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    code |= {f"dmtjepa/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} | {"dmtjepa/py.typed"}
    code |= {str(path.relative_to(ROOT)) for path in (ROOT / "dmtjepa" / "evaluation" / "page" / "templates").iterdir()}
    assert code <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/", "experiments/", "tools/"))}
    metadata = next(name for name in names if name.endswith("entry_points.txt"))
    assert "dmtjepa = dmtjepa.cli:main" in (tmp_path / "site" / metadata).read_text()
    program = "import dmtjepa.kernels; from dmtjepa.cli import main; main(['settings', '--shipped'])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list_shipped()
