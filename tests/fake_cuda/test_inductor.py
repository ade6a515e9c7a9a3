"""What the options of Inductor do to its kernels."""

import json
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_layer_norms_of_vit_huge_hold_their_rows(start_on):
    ended = start_on(sys.executable, Path(__file__).with_name("row_kernels.py")).end()
    assert ended.code == 0, ended.output
    found = json.loads(ended.output.splitlines()[-1])
    assert found["bfloat16"] == {"kernels": 1, "held": 1, "float32": 0}
    # Of the weight's rows, too.
    assert found["fp8"] == {"kernels": 2, "held": 2, "float32": 0}


@pytest.mark.slow
def test_tuned_products_have_gelu_in_their_kernels(start_on):
    ended = start_on(sys.executable, Path(__file__).with_name("tuned_kernels.py")).end()
    assert ended.code == 0, ended.output
    found = json.loads(ended.output.splitlines()[-1])
    assert [name[:10] for name in found["default"]] == ["triton_poi"]
    tuned = found["max-autotune-no-cudagraphs"]
    assert [name[:10] for name in tuned] == ["triton_tem"] * 2, "products alone"
    assert any("gelu" in name for name in tuned)
