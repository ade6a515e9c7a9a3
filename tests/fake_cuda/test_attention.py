"""Which attention kernels run on a GPU for which PyTorch prefers cuDNN."""

import json
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("attention_kernels.py")
FLASH = ["aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_backward"]
VARLEN = ["torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"]
XFORMERS = ["xformers_flash::flash_bwd", "xformers_flash::flash_fwd"]


@pytest.fixture(scope="module")
def found(start_on):
    ended = start_on(sys.executable, PROGRAM).end()
    assert ended.code == 0, ended.output
    return json.loads(ended.output.splitlines()[-1])


def test_attention_never_runs_on_cudnn(found):
    assert found["preferred"] == "CUDNN_ATTENTION"  # PyTorch's own choice; otherwise this test shows nothing
    operators = found["operators"]
    called = {name for kinds in operators.values() for names in kinds.values() for name in names}
    assert not any("cudnn" in name for name in called)
    for name in ("sdpa", "sdpa, compiled", "auto without xFormers"):
        assert operators[name] == {"batch": FLASH, "packed": VARLEN}
    # No flash kernel takes float32, or heads of 12 channels with a mask.
    assert all("efficient" in name for names in operators["sdpa, float32"].values() for name in names)
    assert operators["sdpa, heads of 12"]["batch"] == FLASH


def test_auto_is_xformers(found):
    if "auto" not in found["operators"]:
        pytest.skip("xFormers is not installed")
    assert found["operators"]["auto"] == {"batch": XFORMERS, "packed": XFORMERS}


def test_compiler_knows_what_xformers_returns(found):
    returned, announced = found["flash"]
    assert returned == announced
