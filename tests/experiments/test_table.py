"""Tables of runs: their order, their settings, and their faults."""

import pytest

from experiments.table import ROOT, TableError, read_table

TEXT = """
base: configs/quickstart.yaml
settings: [optimization.epochs=2, data.dataset=folder]
variants:
  ijepa: [patch.local_agg_head=false]
  patch: [patch.query=patch, optimization.epochs=3]
seeds: [4, 7]
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "table.yaml"
        path.write_text(text)
        return path

    return write


def test_runs_of_the_first_seed_come_first(write):
    runs = read_table(write(TEXT)).runs()
    assert [run.name for run in runs] == ["ijepa-seed4", "patch-seed4", "ijepa-seed7", "patch-seed7"]


def test_a_variant_changes_the_settings_of_all_runs(write, tmp_path):
    images = tmp_path / "2026"  # YAML would read a number
    ijepa, patch = (run.config(images, tmp_path / "out") for run in read_table(write(TEXT)).runs()[2:])
    assert (ijepa.optimization.epochs, patch.optimization.epochs) == (2, 3)
    assert (ijepa.patch.local_agg_head, patch.patch.local_agg_head, patch.patch.query) == (False, True, "patch")
    assert (patch.runtime.seed, patch.data.path, patch.logging.path) == (7, images, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("variants:", "variant:"), "variants: Field required; variant: Extra inputs are not permitted"),
        (("  ijepa:", "  i/jepa:"), "'i/jepa' is the name of a folder"),
        (("[4, 7]", "[]"), "seeds: List should have at least 1 item"),
        (("[4, 7]", "[four]"), r"seeds\.0: Input should be a valid integer"),
    ],
)
def test_faults_are_named(write, change, words):
    with pytest.raises(TableError, match=words):
        read_table(write(TEXT.replace(*change)))


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "tables").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_table_of_the_project_is_possible(path, tmp_path):
    for run in read_table(path).runs():
        run.config(tmp_path, tmp_path / "out")
