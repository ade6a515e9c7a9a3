"""The kernels of a LayerNorm of ViT-H, and of one before a float8 product, on a fake H100; prints what they are."""

import json

import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from dmtjepa.models.fp8 import compute_in_fp8
from dmtjepa.models.layers import LayerNorm, Linear
from dmtjepa.training.inductor import configure_inductor
from tests.helpers import no_machine_code  # noqa: F401

D = 1280

if __name__ == "__main__":
    configure_inductor()
    norm, linear = LayerNorm(D), Linear(D, 32)
    x = torch.zeros(512, D, device="cuda", dtype=torch.bfloat16)
    found = {}
    for name in ("bfloat16", "fp8"):
        layers = nn.Sequential(norm, linear).to("cuda", torch.bfloat16)
        if name == "fp8":
            compute_in_fp8(layers, "cuda")
        with torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(layers, fullgraph=True, dynamic=False), x)
        found[name] = {
            "kernels": code.count("@triton_heuristics."),
            "held": code.count("@triton_heuristics.persistent_reduction"),
            "float32": code.count(f"empty_strided_cuda((512, {D}), ({D}, 1), torch.float32)"),
        }
        torch._dynamo.reset()
    print(json.dumps(found))
