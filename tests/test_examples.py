"""The notebooks run from top to bottom, with small images and weights in place of the reader's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.run_folders import write_images

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 2}  # of vit_nano
SETTINGS = {
    "data": {"crop_size": 32, "loader": "pil", "num_workers": 0},
    "mask": {"patch_size": 4, "min_keep": 1},
    "patch": {"local_agg_head": True},
    "meta": {"model_name": "vit_nano", "pred_depth": 1, "pred_emb_dim": 48},
}


def run_notebook(name: str, **parameters: Any) -> dict[str, Any]:
    """Run the cells of a notebook in this process; returns what they define.

    Args:
        parameters: replace what the cell tagged `parameters` defines.
    """
    variables: dict[str, Any] = {"__name__": "__main__"}
    tagged = 0
    for cell in json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{name}, cell {cell['id']}", "exec"), variables)
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= variables.keys()
            variables |= parameters
            tagged += 1
    assert tagged == 1
    return variables


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """train/ and val/ of 3 classes that differ in color, 10 and 4 images each."""
    folder = tmp_path_factory.mktemp("examples") / "images"
    write_images(folder / "train", 10, seed=0)
    write_images(folder / "val", 4, seed=1)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder of timm with weights that its own class has drawn."""
    timm = pytest.importorskip("timm")
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = timm.create_model("vit_huge_patch14_gap_224", **SIZES)
    timm.models.save_for_hf(model, folder, model_args=SIZES, safe_serialization=True)
    return folder


@pytest.fixture
def figures(monkeypatch) -> list[Any]:
    """The figures that a notebook shows."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown: list[Any] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    yield shown
    plt.close("all")


@pytest.mark.slow
def test_features_of_photographs(images, weights, figures):
    found = run_notebook("photographs", PHOTOGRAPHS=str(images / "val"), WEIGHTS=str(weights))
    assert found["colors"].shape == (12, 8, 8, 3)
    assert len(figures) == 2
    classes = torch.tensor([int(path.parent.name[-1]) for path in found["paths"]])
    assert (classes[found["nearest"][:, 0]] == classes).float().mean() > 0.8  # colors tell the classes apart


@pytest.mark.slow
def test_continuing_from_weights(images, weights, figures, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(SETTINGS))
    found = run_notebook(
        "continue_from_weights",
        IMAGES=str(images), WEIGHTS=str(weights), SETTINGS=str(settings), EPOCHS=1, BATCH_SIZE=10,
        RUN=str(tmp_path / "run"),
    )  # fmt: skip
    # The first measurement is of the weights that the run started from.
    assert found["report"].linear["start"] == found["before"].linear["trained"]
    assert [row["step"] for row in found["rows"]] == [-1, 2]
    assert len(figures) == 1
    assert any(word in capsys.readouterr().out for word in ("not clearly different", "better", "worse"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert not [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")]
