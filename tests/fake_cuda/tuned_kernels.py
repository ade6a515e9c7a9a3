"""The kernels of an MLP whose products are tuned, and of one whose products are not, on a fake H100; prints them.

Times on a fake GPU say nothing, so that only kernels of Triton are candidates, and any of them can win: also one that
needs more shared memory than there is. This process compiles them all, so that none gets so far as to be refused.
"""

import json
import re

import torch
from torch._inductor.utils import run_and_get_code

from dmtjepa.models.layers import Mlp
from tests.helpers import no_machine_code  # noqa: F401

if __name__ == "__main__":
    torch._inductor.config.max_autotune_gemm_backends = "TRITON"
    torch._inductor.config.compile_threads = 1
    mlp = Mlp(256, 1024).to("cuda", torch.bfloat16)
    x = torch.zeros(512, 256, device="cuda", dtype=torch.bfloat16)
    found = {}
    for mode in ("default", "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        with torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(mlp, fullgraph=True, dynamic=False, mode=mode), x)
        found[mode] = re.findall(r"^(triton_\w+) = async_compile", code, re.MULTILINE)
    print(json.dumps(found))
