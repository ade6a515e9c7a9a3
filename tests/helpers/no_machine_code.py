"""Import this in a program on fake GPUs: Triton checks its kernels as ever, but makes no machine code, which nothing
would run. To make it takes half of the time that compiling does.
"""

import re

import triton


def leave_out_machine_code(backend=None, stages=None, options=None, language=None, capability=None):
    """Keep the first stage of the compilation of a kernel, and pretend the last. Triton calls this for each kernel.

    Triton 3.9 also calls it without arguments, for what tells the kernels in its cache apart: a name and a hash.
    """
    if stages is None:
        return "no machine code", "no machine code"

    def pretend(source, metadata):
        metadata |= dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
        metadata |= {"global_scratch_align": 1, "profile_scratch_align": 1, "tensordesc_meta": []}
        metadata["name"] = re.search(r"tt.func public @(\w+)", str(source))[1]
        return b"no machine code"

    for name in list(stages)[1:]:
        del stages[name]
    stages["cubin"] = pretend


triton.knobs.runtime.add_stages_inspection_hook = leave_out_machine_code
