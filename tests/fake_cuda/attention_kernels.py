"""Attention on a fake H100 with a recent cuDNN; prints the operators that each choice calls, forward and backward."""

import importlib.util
import json
import warnings
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dmtjepa.models.attention import AttentionFunction, choose_attention
from dmtjepa.packing import Packing, pack

HEAD_SIZES = (24, 32, 64, 80)
LENGTHS = (48, 82)


class Recorder(TorchDispatchMode):
    """Notes the attention operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # newer versions of PyTorch compile nothing under other modes

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "attention" in function.name() or "flash" in function.name() or "attn" in function.name():
            self.names.add(function.name())
        return function(*arguments, **(keywords or {}))


def record(attend: AttentionFunction, shape: tuple[int, ...], dtype: torch.dtype, packing: Packing | None) -> list[str]:
    leaves: list[Tensor] = [torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
    with Recorder() as recorder:
        attend(*leaves, packing).sum().backward()
    return sorted(recorder.names)


def record_all(attend_with: dict[int, AttentionFunction], dtype: torch.dtype = torch.bfloat16) -> dict[str, list[str]]:
    """Operators of batches and of packed sequences, over all head sizes and lengths."""
    found: dict[str, set[str]] = {"batch": set(), "packed": set()}
    for head_dim, attend in attend_with.items():
        for length in LENGTHS:
            found["batch"] |= set(record(attend, (2, length, 4, head_dim), dtype, None))
            packing = Packing(*(x.cuda() for x in pack(torch.tensor([3, length, 1]).numpy())))
            found["packed"] |= set(record(attend, (1, length + 4, 4, head_dim), dtype, packing))
    return {name: sorted(operators) for name, operators in found.items()}


def describe_flash_outputs() -> list[str]:
    """Shapes and types of what xFormers' operator returns, for a batch and for packed sequences."""
    found = []
    for shape in ((2, 48, 4, 64), (96, 4, 64)):
        query = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        start = torch.tensor([0, 40, 96], device="cuda", dtype=torch.int32) if len(shape) == 3 else None
        most = shape[-3], shape[-3], 0.0, 0.125
        outputs = torch.ops.xformers_flash.flash_fwd(
            query, query, query, start, start, None, *most, False, -1, -1, False, None
        )
        found += [f"{list(output.shape)} {output.stride()} {output.dtype}" for output in outputs]
    return found


def choose(backend: str) -> dict[int, AttentionFunction]:
    return {head_dim: choose_attention(backend, "cuda", head_dim) for head_dim in HEAD_SIZES}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    query = torch.empty(2, 4, 48, 64, device="cuda", dtype=torch.bfloat16)
    preferred = SDPBackend(torch._fused_sdp_choice(query, query, query)).name
    found = {"sdpa": record_all(choose("sdpa"))}
    compiled = torch.compile(choose("sdpa")[64], fullgraph=True, backend="aot_eager")
    found["sdpa, compiled"] = record_all({64: compiled})
    found["sdpa, float32"] = record_all(choose("sdpa"), torch.float32)
    found["sdpa, heads of 12"] = record_all({12: choose_attention("auto", "cuda", 12)})
    returned, announced = [], []
    if importlib.util.find_spec("xformers") is not None:
        found["auto"] = record_all(choose("auto"))
        returned = describe_flash_outputs()
        with FakeTensorMode():
            announced = describe_flash_outputs()
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        found["auto without xFormers"] = record_all(choose("auto"))
    print(json.dumps({"preferred": preferred, "operators": found, "flash": [returned, announced]}))
